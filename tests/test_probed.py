"""What a probe found, on disk: once for a model, whatever happens to the file; fine-tunes are other models."""

import copy
import hashlib
import json
import os

import platformdirs
import pytest
import torch
from accelerate import cpu_offload
from torch.testing._internal.two_tensor import TwoTensor

import kvfold
from kvfold.artefacts import probed
from kvfold.artefacts.weights import sample
from models import subject


@pytest.fixture
def folder(tmp_path, monkeypatch):
    subject("llama")
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path / "mine"))
    monkeypatch.delenv("KVFOLD_PROBES")
    return tmp_path / "mine/probes"


@pytest.fixture
def passes(monkeypatch):
    """How often a model was really looked at."""
    made, real = [], probed.resolve_name

    def counting(place):
        return lambda model: made.append(model) or real(place)(model)

    monkeypatch.setattr(probed, "resolve_name", counting)
    return made


def again():
    """The model as another process loads it."""
    return copy.deepcopy(subject("llama")).eval()


def heads(model):
    return kvfold.Cache(model, "kvfold").method.heads


def test_a_model_pays_once_for_ever(folder, passes):
    first, found = again(), heads(model := again())
    (path,) = folder.iterdir()
    took = probed.probe_seconds(model)
    assert heads(first) == found and len(passes) == 1 and list(folder.iterdir()) == [path]
    assert probed.probe_seconds(first) == took and took["copying"] > 0
    assert f"copying {took['copying']:.1f} s" in probed.probe_note(took) and probed.probe_note({}) == ""
    kvfold.Cache(reader := again(), "full")  # which changes the model's attention, not what the model is
    assert heads(reader) == found and len(passes) == 1


@pytest.mark.parametrize("change", ["norm", "mlp", "middle", "config", "dtype"])
def test_a_fine_tune_is_another_model(folder, passes, change):
    heads(again())
    model = again()
    if change == "dtype":
        model.bfloat16()
    elif change == "config":
        model.config.rms_norm_eps *= 2
    else:
        layer = model.model.layers[1]
        weight = {"norm": model.model.norm, "mlp": layer.mlp.up_proj, "middle": layer.self_attn.v_proj}[change].weight
        with torch.no_grad():
            weight.mul_(1.01)
    heads(model)
    assert len(passes) == 2 and len(list(folder.iterdir())) == 2


def test_weights_made_of_several_tensors():
    """As quantised ones are: what each is made of counts."""
    found = set()
    for change in (0.0, 0.0, 1.0):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(TwoTensor(torch.ones(3, 5), torch.ones(3, 5) + change))
        module.scalar, module.none = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.zeros(0, 4))
        sample(digest := hashlib.sha256(), module)
        found.add(digest.hexdigest())
    assert len(found) == 2


def test_under_an_adapter_nothing_is_kept(folder, passes):
    """One that is switched on or off leaves the weights as they are."""
    for _ in range(2):
        model = again()
        model.model.layers[0].self_attn.q_proj.base_layer = torch.nn.Identity()
        heads(model)
    assert len(passes) == 2 and not folder.exists()


@pytest.mark.parametrize(
    "broken",
    [
        lambda data: b"", lambda data: data[:-40], lambda data: b"\xff" + data,
        *(lambda data, part=part, value=value: json.dumps({**json.loads(data), part: value}).encode()
          for part, value in [
              ("format", 99), ("model", {"fingerprint": "of another"}), ("provenance", {}), ("data", {}),
              ("data", {"scores": []}), ("data", {"scores": [[]]}), ("data", {"scores": [[0.5], [0.5, 0.5]]}),
              ("data", {"scores": [[float("nan")]]}), ("data", {"scores": [[float("inf")]]}),
              ("data", {"scores": [[-1.0]]}), ("data", {"scores": [["1"]]}),
              ("data", {"scores": 3}),
          ]),
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(folder, passes, caplog, broken):
    found = heads(again())
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(broken(whole))
    assert heads(again()) == found and len(passes) == 2
    (said,) = [record.message for record in caplog.records if record.name == "kvfold"]
    assert said.startswith("what the probe copying found before is damaged, so it looks again") and str(path) in said
    assert json.loads(path.read_bytes())["data"] == json.loads(whole)["data"] and list(folder.iterdir()) == [path]
    assert heads(again()) == found and len(passes) == 2


@pytest.mark.parametrize("home", ["file", "unknown", "none"])
def test_without_a_folder_that_can_be_written(folder, passes, monkeypatch, caplog, home):
    place = folder.parent.parent / "file"
    place.write_text("")
    monkeypatch.chdir(place.parent)
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(place / "x") if home == "file" else "~nobody-has-this-name/x")
    if home == "none":  # as where a container's user has none
        monkeypatch.delenv("KVFOLD_ARTEFACTS")
        monkeypatch.setattr(platformdirs, "user_data_dir", lambda _: "~/.local/share/kvfold")
    assert heads(again()) == heads(again()) and len(passes) == 2
    said = [record.message for record in caplog.records if record.name == "kvfold"]
    assert len(said) == 2 and all("is not kept" in text and "KVFOLD_ARTEFACTS" in text for text in said)
    assert place.read_text() == "" and os.listdir() == ["file"]


def test_weights_that_are_elsewhere(folder, passes):
    """accelerate brings them layer by layer: nobody knows them before."""
    for _ in range(2):
        heads(cpu_offload(again(), torch.device("cpu")))
    assert len(passes) == 2 and not folder.exists()


def test_off_is_off(folder, passes, monkeypatch):
    monkeypatch.setenv("KVFOLD_PROBES", "off")
    assert heads(again()) == heads(again()) and len(passes) == 2 and not os.path.exists(folder)
