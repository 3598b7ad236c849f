"""`kvfold calibrate`: what it refuses before a model is loaded, and what it writes."""

import json
from pathlib import Path

import pytest

from kvfold import artefacts
from kvfold.cli.calibrate import calibrate_command
from models import build


def test_refused_before_anything_is_loaded():
    with pytest.raises(
        ValueError, match="method='snapkv' needs no calibration; those that do: a2ats, attention-gate, comp"
    ):
        calibrate_command("snapkv", model="nowhere")
    with pytest.raises(ValueError, match=r"method='headkvv' is unknown \(did you mean 'headkv'"):
        calibrate_command("headkvv", model="nowhere")
    with pytest.raises(ValueError, match=r"out='gates.tsv' must end in .json"):
        calibrate_command("duoattention", model="nowhere", out=Path("gates.tsv"))
    with pytest.raises(ValueError, match=r"out='gates.json' must end in .safetensors"):
        calibrate_command("attention-gate", model="nowhere", out=Path("gates.json"))


def test_options_of_other_methods_are_refused():
    with pytest.raises(ValueError, match="codes=64 is an option of a2ats alone, not of headkv"):
        calibrate_command("headkv", model="nowhere", codes=64)
    with pytest.raises(ValueError, match="pairs=2 is an option of elitekv alone, not of a2ats"):
        calibrate_command("a2ats", model="nowhere", pairs=2)


def test_writes_what_kvfold_finds(tmp_path, monkeypatch, capsys):
    from test_calibration import Words

    model = build("llama")
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path))
    monkeypatch.setattr("kvfold.models.load.load", lambda *_, **__: (model, Words()))
    (tmp_path / "story.txt").write_text("It was a dark and stormy night. " * 99)
    calibrate_command("razorattention", "some/tiny", None, tmp_path / "story.txt", None, 81, seed=3, json=True)
    said = json.loads(capsys.readouterr().out)
    found = artefacts.find("razorattention", model)
    assert said["path"].startswith(str(tmp_path / "razorattention/tiny-"))
    assert found.data == said["data"] and found.model["name"] == "tiny"
    assert found.provenance["seed"] == 3 and found.provenance["length"] == 81
