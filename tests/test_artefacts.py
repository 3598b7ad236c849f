"""Calibration files: written whole or not at all, found by method and model, refused with the way out."""

import hashlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kvfold
from kvfold import artefacts
from kvfold.artefacts import Artefact
from kvfold.artefacts.fields import artefact_fields, cache_fields
from models import build, subject

FAMILIES = ["llama", "llama-one-layer", "yarn", "qwen3", "gemma3", "mistral-sliding"]
ABOUT = {"name": "tiny", "layers": 3, "kv_heads": 2, "query_heads": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in FAMILIES:  # what they are given lies in the folder of all tests
        subject(name)
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path / "mine"))
    return tmp_path


def made(model, method="duoattention", **data) -> Artefact:
    data = data or {"gates": [[0.9, 0.1], [0.2, 0.3], [0.4, 0.5]]}
    return Artefact(method, {**ABOUT, "fingerprint": artefacts.fingerprint(model)}, data, {"seed": 0})


def test_written_and_found(folder):
    model = subject("llama")
    path = artefacts.save(made(model))
    assert path == folder / "mine/duoattention" / f"tiny-{artefacts.fingerprint(model)}.json"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert artefacts.find("duoattention", model) == artefacts.load(path) == made(model)
    assert json.loads(path.read_text())["format"] == 1
    artefacts.save(replace(made(model), data={"gates": [[1.0, 1.0]] * 3}))  # a new one takes its place
    assert artefacts.find("duoattention", model).data == {"gates": [[1.0, 1.0]] * 3}


def test_a_failed_write_leaves_the_old_file(folder):
    path = artefacts.save(made(subject("llama")))
    with pytest.raises(TypeError):
        artefacts.save(made(subject("llama"), gates=object()), path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert artefacts.load(path) == made(subject("llama"))


@pytest.mark.parametrize("method", ["../../x", "/x", "a/b", "..", "", "a b"])
def test_a_method_is_no_path(method, folder):
    with pytest.raises(ValueError, match=r"method='.*' of an artefact must be letters, digits, - and _"):
        artefacts.save(made(subject("llama"), method))
    assert not artefacts.user_folder().exists()


def test_names_of_models_become_names_of_files(folder):
    about = {**ABOUT, "name": "../../a b", "fingerprint": "../c"}
    path = artefacts.save(Artefact("headkv", about, {"reason": [[1.0]]}, {}))
    assert path == artefacts.user_folder() / "headkv" / "..-..-a-b-..-c.json"


def test_a_fingerprint_is_the_architecture():
    llama = artefacts.fingerprint(subject("llama"))
    assert len(llama) == 16 and int(llama, 16) >= 0
    assert len({artefacts.fingerprint(subject(name)) for name in FAMILIES}) == len(FAMILIES)


def test_other_weights_have_the_same_fingerprint(monkeypatch):
    monkeypatch.setattr("models.calibrate", lambda model, name: None)
    assert artefacts.fingerprint(build("llama", seed=5)) == artefacts.fingerprint(subject("llama"))


def test_what_ships_is_named_by_these_fields():
    """The names of shipped files and of every user's: SHA-256 of these fields, whatever else a cache looks at."""
    fields = {
        "head_dim": 64, "hidden_size": 576, "intermediate_size": None, "layer_types": None, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "partial_rotary_factor": None,
        "rope_parameters": {"rope_theta": 1e5}, "rope_scaling": None, "rope_theta": None, "sliding_window": None,
        "vocab_size": 49152,
    }  # fmt: skip
    config = SimpleNamespace(**{name: value for name, value in fields.items() if value is not None}, hidden_act="silu")
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: config))
    assert artefacts.fingerprint(model) == hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]
    assert artefact_fields(model) == fields


def test_what_else_a_config_says_of_heads_names_an_artefact():
    plain, ntk = subject("llama"), subject("ntk")
    assert "max_position_embeddings" not in artefact_fields(plain)  # nothing turns by it
    assert artefact_fields(ntk)["max_position_embeddings"] == 512
    for name, value in (("attention_multiplier", 0.5), ("no_rope_layers", [1, 0, 1])):
        model = build("llama")
        setattr(model.config, name, value)
        assert artefact_fields(model) == artefact_fields(plain) | {name: value}


def test_a_cache_looks_at_all_that_is_not_known_to_be_blind():
    found = cache_fields(subject("llama"))
    assert {"rms_norm_eps", "hidden_act", "attention_bias", "rope_parameters", "dtype"} <= found.keys()
    blind = {"initializer_range", "pad_token_id", "max_position_embeddings", "attention_dropout", "use_cache"}
    assert not blind & found.keys() and json.loads(json.dumps(found)) == found
    model = build("llama")
    more = {"invented_by_a_later_release": 3, "output_gate_type": "x", "dropless": True}
    for name, value in more.items():
        setattr(model.config, name, value)
    assert cache_fields(model) == found | more


def test_has_is_whether_find_would_find(folder):
    llama, yarn = subject("llama"), subject("yarn")
    assert not artefacts.has("duoattention", llama)
    artefacts.save(made(llama), artefacts.user_folder() / "duoattention/a.json")
    artefacts.save(made(llama, "headkv", retrieval=[[1.0, 2.0]] * 3), artefacts.user_folder() / "duoattention/b.json")
    assert artefacts.has("duoattention", llama) and not artefacts.has("duoattention", yarn)
    assert not artefacts.has("headkv", llama)  # one that lies in another method's folder


def test_nothing_found_names_the_command(folder):
    with pytest.raises(ValueError, match=r"headkv has no calibration for .*kvfold calibrate headkv --model"):
        kvfold.Cache(subject("llama"), "headkv")


def test_a_model_that_needs_nothing_looks_for_nothing(folder):
    with pytest.warns(UserWarning, match="has no layer with full attention"):
        kvfold.Cache(subject("mistral-sliding"), "duoattention")


def test_a_named_file_goes_first(folder):
    model = subject("llama")
    artefacts.save(made(model))
    path = artefacts.save(made(model, gates=[[0.5, 0.25]] * 3), folder / "own.json")
    cache = kvfold.Cache(model, "duoattention", calibration=str(path))
    assert cache.method.gates == ((0.5, 0.25),) * 3 and cache.method.calibration is None
    assert kvfold.parse(str(cache.method)) == cache.method


def test_refused(folder):
    model = subject("llama")

    def as_text(method):
        return json.dumps({"format": 1, "method": method, "model": {"fingerprint": ""}, "data": {}, "provenance": {}})

    other = artefacts.save(made(subject("qwen3")), folder / "other.json")
    with pytest.raises(ValueError, match=r"was made on .tiny. .*; this model is"):
        artefacts.find("duoattention", model, other)
    with pytest.raises(ValueError, match="is for duoattention, not for headkv"):
        artefacts.find("headkv", model, other)
    with pytest.raises(ValueError, match="is not a calibration file"):
        artefacts.load(folder / "none.json")
    for text, error in (
        ("[]", "is not a calibration file: it has no number of a format"),
        ('{"format": 2}', "was written by format 2, this kvfold reads format 1"),
        ('{"format": 1}', "lacks method"),
        (as_text("../../x"), r"is for method='../../x', which is no method's name"),
    ):
        (folder / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=error):
            artefacts.load(folder / "bad.json")
    artefacts.save(made(model, "headkv", copy=[[0.1] * 4] * 3))
    with pytest.raises(ValueError, match="lacks 'reason'"):
        kvfold.Cache(model, "headkv")
    assert kvfold.Cache(model, "headkv", table="copy").method.heads == ((0.1,) * 4,) * 3


DAMAGED = {
    "cut.json": b'{"format": 1, "method": "duoatt',
    "bytes.json": b"\xff\xfe\x00",
    "deep.json": b"[" * 100_000,
    "older.json": b'{"format": 0}',
    "list.json": b"[]",
    "parts.json": b'{"format": 1, "method": "duoattention", "model": [], "data": {}, "provenance": {}}',
    "cut.safetensors": b"\xff" * 40,
    "empty.safetensors": b"",
}


@pytest.mark.parametrize("name", [*DAMAGED, "a-folder.json", "no-such-file.json"])
def test_a_damaged_file_of_another_model_is_passed_over_and_named(folder, caplog, name):
    model, place = subject("llama"), artefacts.user_folder() / "duoattention"
    place.mkdir(parents=True)
    if name in DAMAGED:
        (place / name).write_bytes(DAMAGED[name])
    elif name == "a-folder.json":
        (place / name).mkdir()
    else:
        (place / name).symlink_to(folder / "nowhere.json")
    with pytest.raises(ValueError, match=f"has no calibration for .*passed over: .*{re.escape(name)}"):
        artefacts.find("duoattention", model)
    assert not artefacts.has("duoattention", model)
    path = artefacts.save(made(model))
    caplog.clear()
    assert artefacts.find("duoattention", model) == artefacts.load(path) and artefacts.has("duoattention", model)
    assert kvfold.Cache(model, "duoattention").method.gates is not None
    assert all("passed over" in said and name in said for said in caplog.messages) and caplog.messages
    for use in (lambda: artefacts.load(place / name), lambda: artefacts.find("duoattention", model, place / name)):
        with pytest.raises(ValueError, match=f"calibration=.*{re.escape(name)}"):
            use()
    # One that is named for this very model is its own: what else lies there is not taken in its place.
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path.name}.* is not a calibration file.*measure again"):
        artefacts.find("duoattention", model)


@pytest.mark.parametrize(
    "table",
    ["abc", 5, None, {"a": 1}, [["a"]], [[1.0, None]], [[1.0], [2.0, 3.0]], [], [[]], [[-1.0, 1.0]] * 3,
     [[float("inf")] * 2] * 3, [[10**400] * 2] * 3, [[1.0, 2.0]] * 2, [[[1.0]]]],
)  # fmt: skip
def test_a_table_that_is_none_is_named(folder, table):
    model = subject("llama")
    artefacts.save(made(model, gates=table))
    # TypeError where annotations are checked, as they are here: they come before the method's own look.
    with pytest.raises((ValueError, TypeError), match="gates"):
        cache = kvfold.Cache(model, "duoattention")
        model(torch.ones(1, 8, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("part", ["wq", "wv", "wg", "bg"])
@pytest.mark.parametrize("damage", [None, (2, 3), (0, 2, 4, 8), (3, 2, 4, 9), (3, 5)])
def test_gates_that_do_not_fit_together_are_named(folder, part, damage):
    model = subject("llama")
    parts = {name: (3, 2, 4, 64) for name in ("wq", "wk", "wv")} | {"wg": (3, 2, 2, 4), "bg": (3, 2)}
    data = {name: torch.zeros(shape) for name, shape in parts.items()}
    artefacts.save(made(model, "attention-gate", **data))
    kvfold.Cache(model, "attention-gate")
    del data[part]
    if damage is not None:
        data[part] = torch.zeros(damage)
    artefacts.save(made(model, "attention-gate", **data))
    with pytest.raises(ValueError, match="calibration of attention-gate"):
        kvfold.Cache(model, "attention-gate")


def test_pipelines_and_wrappers_bind_their_parts():
    model = subject("llama")
    bound = kvfold.Cache(model, "compresskv(budget=0.5) | duoattention(sinks=1)").method
    assert bound.stages[0].heads is not None and bound.stages[1].gates is not None
    inner = kvfold.Cache(model, "headkv", score="compresskv(window=4)").method
    assert inner.inner.heads is not None and inner.inner.window == 4 and inner.heads is not None
    assert kvfold.parse(str(inner)) == inner


def test_what_ships_is_whole():
    """Every shipped file loads, and its tables have the layers and heads that it names."""
    shipped = sorted(artefacts.shipped())
    assert {path.parent.name for path in shipped} == {
        "a2ats", "attention-gate", "compresskv", "duoattention", "elitekv", "epicache", "headkv", "kvquant", "less",
        "memory", "razorattention", "turboquant",
    }  # fmt: skip
    for path in shipped:
        found = artefacts.load(path)
        layers, about = found.model["layers"], found.model
        assert found.method == path.parent.name and about["name"] == path.stem
        assert {"command", "versions", "texts", "seed", "date"} <= found.provenance.keys()
        if found.method == "memory":  # of no layer: tests/hf/test_bits.py
            assert about["layers"] > 0 and set(found.data) == {"shares", "forms", "kl"}
            continue
        for name, table in found.data.items():
            assert len(table) == layers
            if path.suffix == artefacts.TENSORS:
                continue
            widths = {len(row) for row in table} if name not in ("errors", "sensitivity") else set()
            assert widths <= {about["kv_heads"], about["query_heads"]}
