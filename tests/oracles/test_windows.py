"""Sliding windows whose tokens lie in a format: what a step reads, what a prompt leaves, rows, files, and refusals."""

import copy
from dataclasses import dataclass

import pytest
import torch

import kvfold
from kvfold.formats import Dense, Format
from kvfold.hf.saving.said import Entry
from kvfold.hf.saving.window import check_window, window_state
from kvfold.hf.shared_prefill import prefill_many
from kvfold.methods import parse
from kvfold.methods.base import Method, method, registry
from models import VOCAB, build, feed, greedy, subject, tokens

KIVI = "windows(form='kivi(bits=8, group=8, residual=8)')"
SMALL = "windows(form='kivi(bits=4, group=8, residual=0)')"
GREEDY = dict(max_new_tokens=12, do_sample=False)


@pytest.fixture
def plain():
    """The slug of a method that says of all tokens that they lie as the model made them."""

    @method("as-it-is", title="As it is", kind="none")
    @dataclass(frozen=True)
    class AsItIs(Method):
        """Keeps all."""

        format: Format | None = Dense()  # noqa: RUF009  (frozen)

    yield "windows(form='as-it-is')"
    del registry["as-it-is"]


def gemma(window: int = 8):
    return build("gemma3", sliding_window=window)


def held(cache):
    """Everything that the windows hold, as tensors."""
    found = []
    for layer in cache.coded_windows:
        said, tensors = window_state(layer)
        found.append((said["length"], {name: tensor.clone() for name, tensor in tensors.items()}))
    return found


def same(one, other):
    assert len(one) == len(other) > 0
    for (length, tensors), (other_length, other_tensors) in zip(one, other, strict=True):
        assert length == other_length and tensors.keys() == other_tensors.keys()
        assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


@pytest.mark.parametrize("window,lengths", [(8, (5, 30)), (21, (37, 12)), (40, (23,))])
@pytest.mark.parametrize("padded", [False, True])
def test_as_it_is_gives_what_the_model_alone_gives(plain, window, lengths, padded):
    model = gemma(window)
    prompt = tokens(*lengths) if padded else tokens(lengths[0])
    coded, own = kvfold.Cache(model, plain), kvfold.Cache(model, "full")
    for cache in (coded, own):
        cache.said = greedy(model, cache, *prompt.values(), 30)
    torch.testing.assert_close(coded.said[1], own.said[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(coded.said[0], own.said[0])
    assert all(layer.tokens <= window + 16 for layer in coded.coded_windows)


def test_a_second_turn_reads_windows_and_new_tokens(plain):
    model = gemma(21)
    ids = tokens(90)["input_ids"]
    coded, own = kvfold.Cache(model, plain), kvfold.Cache(model, "full")
    for start, stop in ((0, 33), (33, 34), (34, 60), (60, 61), (61, 62), (62, 90)):
        mask = torch.ones(1, stop, dtype=torch.long)
        here, there = (feed(model, cache, ids[:, start:stop], mask) for cache in (coded, own))
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window,length", [(8, 31), (40, 70), (40, 30)])
def test_a_stream_of_tokens_leaves_what_a_prompt_leaves(window, length):
    model = gemma(window)
    ids = tokens(length)["input_ids"]
    states = [torch.randn(1, 2, length, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    made = []
    for steps in ([length], [1] * length, [length // 3, length - length // 3]):
        cache = kvfold.Cache(model, KIVI)
        layer, at = cache.coded_windows[0], 0
        for step in steps:
            layer.update(*(x[:, :, at : at + step].clone() for x in states))
            layer.settle()
            at += step
        made.append([(layer.cumulative_length, window_state(layer)[1])])
    same(made[0], made[1])
    same(made[0], made[2])
    cache = kvfold.Cache(model, KIVI)
    feed(model, cache, ids, torch.ones_like(ids))
    assert cache.coded_windows[0].tokens <= window + 7 + 1
    assert all(not layer.keys.numel() for layer in cache.coded_windows)


def test_codes_are_never_made_anew():
    model = gemma(40)
    cache = kvfold.Cache(model, SMALL)
    ids = tokens(60)["input_ids"]
    feed(model, cache, ids[:, :33], torch.ones(1, 33, dtype=torch.long))
    before = held(cache)
    feed(model, cache, ids[:, 33:60], torch.ones(1, 60, dtype=torch.long))
    for (_, old), (_, new) in zip(before, held(cache), strict=True):
        pages = old["coded.keys"].shape[0] // 2  # of each of two heads
        kept = new["coded.position"].view(2, -1)[0]
        there = torch.isin(old["coded.position"].view(2, -1)[0], kept)
        for name in ("coded.keys", "coded.values"):
            mine = old[name].view(2, pages, -1)[:, there]
            assert torch.equal(new[name].view(2, len(kept), -1)[:, : mine.shape[1]], mine)


def test_bytes_are_those_of_codes():
    model = build("gemma3", sliding_window=256, head_dim=64)
    cache, own = kvfold.Cache(model, "full | windows"), kvfold.Cache(model, "full")
    for each in (cache, own):
        feed(model, each, *tokens(300).values())
    coded = [row for row in cache.report().layers if row.kind == "window"]
    size = torch.long.itemsize  # transformers' layer holds the window's size as a tensor
    assert [row.nbytes - size for row in coded] == [layer.segment.nbytes for layer in cache.coded_windows]
    assert all(row.nbytes < 0.45 * row.dense_nbytes for row in coded)
    assert own.dense_nbytes - cache.dense_nbytes == 2 * size
    assert cache.nbytes < own.nbytes
    assert sum(cache.row_nbytes()) <= cache.nbytes


@pytest.mark.parametrize("method", ["full", "snapkv(budget=0.5)", "kvfold(budget=0.5)"])
def test_rows_are_what_they_are_alone(method):
    model = gemma(21)
    prompts = [tokens(length) for length in (50, 23)]
    alone = []
    for prompt in prompts:
        cache = kvfold.Cache(model, f"{method} | {KIVI}")
        alone.append((cache, feed(model, cache, *prompt.values())[:, -1:]))
    answers = [greedy(model, cache.fork(), logits.argmax(-1), torch.ones(1, length + 1, dtype=torch.long), 9)
               for (cache, logits), length in zip(alone, (50, 23), strict=True)]  # fmt: skip
    both, first = alone[0][0].fork(), torch.cat([logits.argmax(-1) for _, logits in alone])
    both.join(alone[1][0].fork())
    mask = torch.ones(2, 51, dtype=torch.long)
    mask[1, : 50 - 23] = 0
    said, logits = greedy(model, both, first, mask, 9)
    for row, (one, numbers) in enumerate(answers):
        assert torch.equal(said[row : row + 1], one)
        torch.testing.assert_close(logits[row : row + 1], numbers, rtol=1e-3, atol=1e-3)
    both.retire([0])
    left, _ = greedy(model, both, said[1:, -1:], torch.cat([mask[1:], torch.ones(1, 9, dtype=torch.long)], 1), 3)
    assert left.shape == (1, 3)


def test_beams_and_repeated_rows():
    model = gemma(21)
    prompt = tokens(40, 31)
    cache = kvfold.Cache(model, KIVI)
    said = model.generate(**prompt, past_key_values=cache, num_beams=3, **GREEDY)
    assert said.shape == (2, 52)
    assert all(len(layer.keys) == len(layer.segment.counts()) == 6 for layer in cache.coded_windows)


@pytest.mark.parametrize("way", [lambda c: c.fork(), copy.deepcopy])
def test_a_copy_goes_its_own_way(way):
    model = gemma(21)
    cache = kvfold.Cache(model, KIVI)
    feed(model, cache, *tokens(30).values())
    before, other = held(cache), way(cache)
    greedy(model, other, torch.full((1, 1), 7), torch.ones(1, 31, dtype=torch.long), 20)
    same(before, held(cache))


@pytest.mark.parametrize("length", [6, 50])
def test_a_file_goes_on_bit_for_bit(tmp_path, length):
    model = gemma(21)
    cache = kvfold.Cache(model, f"snapkv(budget=0.5) | {KIVI}")
    feed(model, cache, *tokens(length, length - 3).values())
    cache.save(tmp_path / "cache")
    loaded = kvfold.Cache.load(tmp_path / "cache", model)
    same(held(cache), held(loaded))
    assert loaded.method == cache.method
    first, mask = torch.full((2, 1), 9), torch.ones(2, length + 1, dtype=torch.long)
    mask[1, :3] = 0
    one, other = (greedy(model, each, first, mask, 12)[1] for each in (cache, loaded))
    assert torch.equal(one, other)
    assert cache.nbytes >= loaded.nbytes


def test_assisted_decoding_takes_back_what_it_recorded():
    model = gemma(21)
    ids = tokens(50)["input_ids"]
    cache, plain = kvfold.Cache(model, KIVI), kvfold.Cache(model, KIVI)
    for each in (cache, plain):
        feed(model, each, ids[:, :40], torch.ones(1, 40, dtype=torch.long))
    cache.activate_past_recording()
    feed(model, cache, ids[:, 40:46], torch.ones(1, 46, dtype=torch.long))
    cache.crop(-4)
    cache.stop_recording()
    feed(model, plain, ids[:, 40:42], torch.ones(1, 42, dtype=torch.long))
    assert cache.get_seq_length() == plain.get_seq_length() == 42
    first, mask = torch.full((1, 1), 9), torch.ones(1, 43, dtype=torch.long)
    one, other = (greedy(model, each, first, mask, 8)[1] for each in (cache, plain))
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert held(cache)[0][0] == held(plain)[0][0] == 50
    said = model.generate(ids, past_key_values=kvfold.Cache(model, KIVI), prompt_lookup_num_tokens=3,
                          **GREEDY)  # fmt: skip
    assert said.shape[1] == 62


def test_a_crop_of_a_window_that_is_not_full_yet():
    model = gemma(40)
    ids = tokens(30)["input_ids"]
    cache, other = kvfold.Cache(model, KIVI), kvfold.Cache(model, KIVI)
    feed(model, cache, ids, torch.ones_like(ids))
    cache.crop(-11)
    feed(model, other, ids[:, :19], torch.ones(1, 19, dtype=torch.long))
    assert (
        [layer.tokens for layer in cache.coded_windows] == [layer.tokens for layer in other.coded_windows] == [19, 19]
    )
    feed(model, cache, ids, torch.ones(1, 49, dtype=torch.long))
    with pytest.raises(RuntimeError, match="was full"):
        cache.crop(-1)


def test_parts_and_chunks_read_exact_windows():
    model = gemma(21)
    ids = tokens(100)["input_ids"]
    logits = []
    for options in ({"part_size": 0}, {"part_size": 16}, {"prefill_chunk": 30}):
        cache = kvfold.Cache(model, SMALL, **options)
        logits.append(feed(model, cache, ids, torch.ones_like(ids)))
        logits.append(feed(model, cache, ids[:, :1], torch.ones(1, 101, dtype=torch.long)))
    for number in (2, 4):
        torch.testing.assert_close(logits[number], logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[number + 1], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["snapkv", "snapkv | fp8", "full", "nothing", "minicache", "windows"])
def test_what_is_no_format_is_refused(form):
    with pytest.raises(ValueError, match=r"form=|method"):
        parse(f"full | windows(form={form!r})")


@pytest.mark.parametrize("method", ["fastkv | windows", "windows | windows(form='fp8')"])
def test_what_can_not_be_is_refused(method):
    with pytest.raises(ValueError, match=r"narrows|two stages"):
        kvfold.Cache(gemma(), method)


def test_models_without_windows_are_left_as_they_are():
    cache = kvfold.Cache(subject("llama"), "snapkv(budget=0.5) | windows")
    assert not cache.coded_windows
    with pytest.warns(UserWarning, match="nothing to do"):
        assert not kvfold.Cache(build("mistral-sliding"), "windows").coded_windows


def test_caches_with_other_windows_do_not_join():
    model = gemma(21)
    one, other = kvfold.Cache(model, KIVI), kvfold.Cache(model, "full")
    for cache in (one, other):
        feed(model, cache, *tokens(20).values())
    with pytest.raises(ValueError, match="windows lie in"):
        one.join(other)
    with pytest.raises(ValueError, match="adopt"):
        prefill_many(model, tokens(20), [kvfold.Cache(model, KIVI)])


def test_a_file_of_other_tokens_is_refused(tmp_path):
    model = gemma(21)
    cache = kvfold.Cache(model, KIVI)
    feed(model, cache, *tokens(40).values())
    layer = cache.coded_windows[0]
    said, tensors = window_state(layer)
    empty = kvfold.Cache(model, KIVI).coded_windows[0]
    check_window(empty, Entry("layer 0", said), tensors, 1, 40)
    for wrong in (
        {**said, "length": 41}, {**said, "held": None}, {**said, "held": {**said["held"], "shape": [2, 16, 0]}},
        {**said, "held": {**said["held"], "dtype": "int8"}}, {**said, "held": {**said["held"], "counts": [[99, 99]]}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="layer 0"):
            check_window(empty, Entry("layer 0", wrong), tensors, 1, 40)
    with pytest.raises(ValueError, match=r"must be|which"):
        check_window(empty, Entry("layer 0", said), {name: x[:-1] for name, x in tensors.items()}, 1, 40)


def test_inside_inference_mode_and_out():
    model = gemma(21)
    cache = kvfold.Cache(model, KIVI)
    with torch.inference_mode():
        feed(model, cache, *tokens(30).values())
    logits = feed(model, cache, torch.full((1, 1), 3), torch.ones(1, 31, dtype=torch.long))
    assert logits.shape[-1] == VOCAB and logits.isfinite().all()
    assert subject("gemma3") is not model


def test_a_call_of_the_body_is_stored_too(tmp_path):
    """What calls the model's body alone has no hook of the whole model behind it."""
    model = gemma(21)
    ids = tokens(30)["input_ids"]
    cache, other = kvfold.Cache(model, KIVI), kvfold.Cache(model, KIVI)
    with torch.no_grad():
        model.model(input_ids=ids, past_key_values=cache)
    feed(model, other, ids, torch.ones_like(ids))
    same(held(cache), held(other))
    cache.save(tmp_path / "cache")
    same(held(kvfold.Cache.load(tmp_path / "cache", model)), held(other))


def test_rows_that_go_take_their_memory_along():
    model = gemma(21)
    one, four = kvfold.Cache(model, KIVI), kvfold.Cache(model, KIVI)
    feed(model, one, *tokens(60).values())
    feed(model, four, *tokens(60, 60, 60, 60).values())
    sizes = four.row_nbytes()
    four.retire([1, 2, 3])
    assert four.nbytes <= 1.1 * one.nbytes
    one.join(four)
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 8 * len(one.layers)


@pytest.mark.parametrize("form", ["fp8", "kivi(residual=8, group=8)", "turboquant", "mustafar(residual=8, group=8)"])
def test_files_in_a_codec(form, tmp_path):
    pytest.importorskip("constriction")
    model = gemma(21)
    cache = kvfold.Cache(model, f"windows(form={form!r})")
    feed(model, cache, *tokens(40).values())
    cache.save(tmp_path / "cache", codec="cachegen")
    same(held(kvfold.Cache.load(tmp_path / "cache", model)), held(cache))


def test_an_empty_cache_has_no_rows_to_repeat():
    cache = kvfold.Cache(gemma(21), KIVI)
    cache.batch_repeat_interleave(3)
    assert cache.get_seq_length() == 0
