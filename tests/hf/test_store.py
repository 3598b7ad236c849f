"""Saved caches: bit for bit what was there, only for the model that made them, whole or not at all."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

import kvfold
from cache_files import rewrite
from kvfold.hf.saving import sealed as store
from kvfold.methods.base import method
from models import FAMILIES, build, feed, greedy, grow, subject, tokens


def saved(path, slug="h2o", name="llama", dtype=torch.float32, **options):
    """A cache that has read a prompt and four tokens, its file, and the prompt's mask with them."""
    prompt = tokens(40, 30)
    options = options if slug in ("full", "split") else {"budget": 0.5, **options}
    model, cache = subject(name, dtype), kvfold.Cache(subject(name, dtype), slug, **options)
    greedy(model, cache, *prompt.values(), 5)
    cache.save(path)
    return model, cache, grow(prompt["attention_mask"], 4)


def refused(path, model, message):
    """Loading fails with `message`, which names the file."""
    with pytest.raises(ValueError, match=message) as caught:
        kvfold.Cache.load(path, model)
    assert repr(str(path)) in str(caught.value)


def planes(cache):
    """Everything that the layers store, by layer, segment and name."""
    for core in cache.paged:
        for number, (_, segment) in enumerate(core.segments):
            chunk = segment.dense()
            for name, plane in {"keys": chunk.keys, "values": chunk.values, **chunk.columns}.items():
                yield (core.layer, number, name), plane[chunk.valid]


def assert_same(one, two):
    found, expected = dict(planes(one)), dict(planes(two))
    assert found.keys() == expected.keys()
    for name, plane in expected.items():
        assert found[name].dtype == plane.dtype and torch.equal(found[name], plane), name


# -- what belongs together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_continues_as_if_nothing_had_happened(name, dtype, tmp_path):
    model, cache, mask = saved(tmp_path / "c", name=name, dtype=dtype)
    loaded = kvfold.Cache.load(tmp_path / "c", build(name, dtype=dtype))  # the same weights, another object
    assert_same(loaded, cache)
    assert [layer.is_initialized for layer in loaded.layers] == [layer.is_initialized for layer in cache.layers]
    first = torch.tensor([[7], [11]])
    got, logits = greedy(loaded.model, loaded, first, grow(mask), 6)
    expected, truth = greedy(model, cache, first, grow(mask), 6)
    assert torch.equal(got, expected) and torch.equal(logits, truth)


def test_an_empty_cache(tmp_path):
    model = subject("gemma3")
    kvfold.Cache(model, "snapkv", budget=3).save(tmp_path / "c")
    loaded = kvfold.Cache.load(tmp_path / "c", model)
    assert not any(layer.is_initialized for layer in loaded.layers)
    assert loaded.get_seq_length() == 0 and loaded.nbytes == kvfold.Cache(model).nbytes
    feed(model, loaded, *tokens(9).values())
    assert loaded.kept_tokens == 3


def test_a_narrow_segment(tmp_path, scratch_methods):
    @method("split", title="Split", kind="quantize")
    @dataclass(frozen=True)
    class Split(kvfold.Method):
        """Every other token in bf16."""

        def after_prefill(self, view):
            return kvfold.Store(kvfold.Dense(torch.bfloat16, page_size=8), view.positions % 2 == 0)

    model, cache, mask = saved(tmp_path / "c", "split")
    loaded = kvfold.Cache.load(tmp_path / "c", model)
    for core in loaded.paged:
        (form, _), (narrow, segment) = core.segments
        assert form == kvfold.Dense() and narrow == kvfold.Dense(torch.bfloat16, page_size=8)
        assert segment.pool.planes["keys"].dtype == torch.bfloat16 and segment.pool.page_size == 8
    assert loaded.method == Split() and loaded.kept(1) == cache.kept(1)
    assert_same(loaded, cache)
    step, mask = torch.tensor([[7], [11]]), grow(mask)
    assert torch.equal(feed(model, loaded, step, mask), feed(model, cache, step, mask))


def test_what_waits_for_a_crop_is_decided_in_the_file_alone(tmp_path):
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "snapkv", budget=6)
    cache.activate_past_recording()
    feed(model, cache, *tokens(30).values())
    cache.save(tmp_path / "c")
    loaded = kvfold.Cache.load(tmp_path / "c", model)
    assert loaded.kept_tokens == 6 and cache.kept_tokens == 30
    cache.crop(0)
    assert_same(loaded, cache)


# -- what does not -------------------------------------------------------------------------------------------


def test_other_weights(tmp_path):
    saved(tmp_path / "c")
    refused(tmp_path / "c", build("llama", seed=1), "a LlamaForCausalLM with other weights than this one's")


@pytest.mark.parametrize(
    "part", ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.k_proj"]
)
def test_one_weight_that_differs(part, tmp_path):
    saved(tmp_path / "c")
    model = build("llama")
    kvfold.Cache.load(tmp_path / "c", model)
    with torch.no_grad():
        model.get_submodule(part).weight.mul_(1.01)
    refused(tmp_path / "c", model, "with other weights")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads=2; this LlamaForCausalLM has num_key_value_heads=4"),
        ({"head_dim": 32}, "head_dim=16; this LlamaForCausalLM has head_dim=32"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters=.*has rope_parameters="),
    ],
    ids=["heads", "head-size", "rope"],
)
def test_another_config(options, message, tmp_path, monkeypatch):
    saved(tmp_path / "c")
    monkeypatch.setitem(FAMILIES, "other", ("llama", options))
    refused(tmp_path / "c", build("other"), message)


def test_another_dtype(tmp_path):
    saved(tmp_path / "c")
    refused(tmp_path / "c", build("llama", dtype=torch.bfloat16), "dtype='torch.float32'.*dtype='torch.bfloat16'")


@pytest.mark.parametrize("size", [0, 5, 300, -1], ids=["empty", "length", "header", "last-byte"])
def test_a_truncated_file(size, tmp_path):
    model, *_ = saved(tmp_path / "c")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:size])
    refused(tmp_path / "c", model, "is not a kvfold cache, or only a part of one")


def test_foreign_files(tmp_path):
    model, path = subject("llama"), tmp_path / "c"
    path.write_text("a letter to nobody, longer than eight bytes")
    refused(path, model, "is not a kvfold cache")
    for metadata in (None, {"kvfold": "[]"}, {"kvfold": "{"}, {"kvfold": "{}"}):
        save_file({"x": torch.zeros(1)}, path, metadata=metadata)
        refused(path, model, "is not a kvfold cache")
    with pytest.raises(FileNotFoundError):
        kvfold.Cache.load(tmp_path / "nowhere", model)


def test_another_version_and_an_unknown_method(tmp_path):
    model, *_ = saved(tmp_path / "c")
    rewrite(tmp_path / "c", lambda header, _: header["groups"][0].update(method="snapvk(budget=3)"))
    refused(tmp_path / "c", model, "holds a cache that can't be made: method='snapvk' is unknown")
    for version, sealed in (("1", True), ("2", False), (4, True), (4, False)):
        rewrite(tmp_path / "c", lambda header, _, version=version: header.update(version=version), sealed=sealed)
        refused(tmp_path / "c", model, f"was written by format {version}, this kvfold reads format 3")


# -- whole or not at all -------------------------------------------------------------------------------------


def test_saving_that_fails_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch):
    model, cache, mask = saved(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    feed(model, cache, torch.tensor([[7], [11]]), grow(mask))

    def half(tensors, name, metadata):
        with open(name, "r+b") as file:
            file.write(before[: len(before) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", half)
        with pytest.raises(OSError, match="no space left"):
            cache.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    cache.save(tmp_path / "c")
    assert_same(kvfold.Cache.load(tmp_path / "c", model), cache)
