"""`kvfold uptrain`: from a model to a folder that is loaded as any other, and trained further."""

import json

import pytest

import kvfold
from kvfold import artefacts
from kvfold.cli.calibrate import calibrate_command
from kvfold.cli.uptrain import uptrain_command
from kvfold.methods.elitekv import BESIDE
from kvfold.models.load import load


def test_the_command_makes_a_model_that_finds_its_calibration(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "story.txt").write_text("It was a dark and stormy night. " * 200)
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path / "mine"))
    given = {"model": str(folder), "texts": tmp_path / "story.txt", "length": 64}
    calibrate_command("elitekv", **given, out=None, samples=2, pairs=2, rank=16)
    out = tmp_path / "made"
    capsys.readouterr()
    uptrain_command(out, **given, steps=3, json=True)
    said = capsys.readouterr()
    assert "step 3 of 3: loss" in said.err and json.loads(said.out)["provenance"]["uptrained"][-1]["steps"] == 3
    assert sorted(each.name for each in tmp_path.iterdir()) == ["made", "mine", "story.txt"]
    model, _ = load(out, progress=False)
    cache = kvfold.Cache(model, "elitekv")
    assert cache.method.calibration == str((out / BESIDE).resolve())
    with pytest.raises(ValueError, match="is there already"):
        uptrain_command(out, **given, steps=3)
    uptrain_command(tmp_path / "further", **{**given, "model": str(out)}, steps=1)
    again = artefacts.load(tmp_path / "further" / BESIDE)
    assert [each["steps"] for each in again.provenance["uptrained"]] == [3, 1] and again.model["name"] == "further"
    with pytest.raises(ValueError, match="pairs=3 is an option of elitekv alone"):
        calibrate_command("headkv", model="nowhere", pairs=3)
