"""`read_order`: the model reads other tokens than it is given, and the caller need not know."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch

import kvfold
from kvfold import Keep, Method
from kvfold.hf.call.reading import Reading
from kvfold.hf.shared_prefill import prefill_many
from models import PAGED, build, dynamic, feed, follow, grow, reference, subject, tokens

pytestmark = pytest.mark.usefixtures("scratch_methods")
STEPS = torch.arange(5, 17).view(2, 6)


def reading(rows, last=None):
    """A method that reads, of every prompt's row, the tokens at these places (from the first that is not padding)."""

    @kvfold.method("test-reading", title="Reading", kind="prefill")
    @dataclass(frozen=True)
    class Chosen(Method):
        seen: list = field(default_factory=list)

        def read_order(self, prompt):
            self.seen.append((prompt.ids.shape[1], prompt.valid.sum(1).tolist()))
            if prompt.ids.shape[1] < 12:
                return None
            start = prompt.ids.shape[1] - prompt.valid.sum(1)
            width = max(map(len, rows))
            order = torch.full((len(rows), width), -1)
            for row, places in enumerate(rows):
                order[row, width - len(places) :] = torch.tensor(places) + start[row * len(start) // len(rows)]
            return order.repeat_interleave(len(prompt.ids) // len(rows), 0)  # beams

        def after_prefill(self, view):
            return None if last is None else Keep(view.last(last))

    return Chosen()


ROWS = ([0, 3, 4, 9, 17, 29], [2, 3, 20])
TWICE = ([*range(30), *range(30)], [*range(21), *range(21)])


@pytest.mark.parametrize("rows", [ROWS, TWICE], ids=["fewer", "twice"])
@pytest.mark.parametrize("name", PAGED)
def test_the_model_reads_what_the_method_says(name, rows):
    prompt = tokens(30, 21)
    model, cache = subject(name), kvfold.Cache(subject(name), reading(rows))
    logits = follow(model, cache, *prompt.values(), STEPS)
    assert cache.get_seq_length() == 36 and cache.paged[0].width == len(rows[0]) + 6
    for row, places in enumerate(rows):
        ids = prompt["input_ids"][row, prompt["attention_mask"][row].bool()][places][None]
        alone = follow(reference(name), dynamic(reference(name)), ids, torch.ones_like(ids), STEPS[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=0)
        text = [*sorted(places), *range(30 - 9 * row, 36 - 9 * row)]
        assert cache.kept(cache.paged[0].layer)[row] == [text] * cache.paged[0].shape[0]
    assert cache.method.seen == [(30, [30, 21])]
    dense = kvfold.Cache(model, "full")
    follow(model, dense, *prompt.values(), STEPS)
    assert cache.dense_nbytes == pytest.approx(dense.dense_nbytes, rel=0.2 if name == "gemma3" else 0)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams):
    prompt = tokens(30, 21)
    model, cache = subject("gemma3"), kvfold.Cache(subject("gemma3"), reading(ROWS))
    out = model.generate(**prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, num_beams=beams)
    assert torch.equal(out[:, :30], prompt["input_ids"])
    for row, places in enumerate(ROWS):
        ids = prompt["input_ids"][row, prompt["attention_mask"][row].bool()][places][None]
        alone = reference("gemma3").generate(ids, max_new_tokens=8, do_sample=False, num_beams=beams)
        assert torch.equal(out[row, 30:], alone[0, len(places) :])


def test_turns_that_are_read_as_they_stand_and_turns_that_are_not():
    model, prompt, further = subject("llama"), tokens(30, 21), tokens(13, 13, seed=3)["input_ids"]
    cache = kvfold.Cache(model, reading(ROWS))
    mask = prompt["attention_mask"]
    feed(model, cache, prompt["input_ids"], mask)
    mask = grow(mask, 4)
    feed(model, cache, further[:, :4], mask)  # too short for the method
    rows = ([1, 12], [0, 5, 12])
    cache.rows.groups = (replace(cache.rows.groups[0], method=reading(rows)),)
    mask = grow(mask, 13)
    logits = feed(model, cache, further, mask)[:, -1]
    assert cache.get_seq_length() == 47 and cache.paged[0].width == 6 + 4 + 3
    for row, places in enumerate(ROWS):
        first = prompt["input_ids"][row, prompt["attention_mask"][row].bool()][places]
        ids = torch.cat([first, further[row, :4], further[row][rows[row]]])[None]
        alone = feed(reference("llama"), dynamic(reference("llama")), ids, torch.ones_like(ids))[:, -1]
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=0)
        start = 30 - 9 * row
        text = [*places, *range(start, start + 4), *(start + 4 + place for place in rows[row])]
        assert cache.kept(0)[row][0] == text


def test_a_body_with_hooks_of_its_own_reads_once():
    model, prompt = subject("llama"), tokens(30, 21)
    kvfold.Cache(model.model, "full")
    cache = kvfold.Cache(model, reading(ROWS))
    feed(model, cache, *prompt.values())
    assert len(cache.method.seen) == 1 and cache.paged[0].width == 6


def test_chunks_are_cut_from_what_is_read():
    model, prompt = subject("llama"), tokens(30, 21)
    whole, parts = (kvfold.Cache(model, reading(TWICE), prefill_chunk=chunk) for chunk in (None, 16))
    logits = follow(model, whole, *prompt.values(), STEPS)
    torch.testing.assert_close(follow(model, parts, *prompt.values(), STEPS), logits, atol=1e-4, rtol=0)
    assert parts.method.seen == [(30, [30, 21])] and parts.get_seq_length() == 36
    cut = kvfold.Cache(model, reading(TWICE, last=5), prefill_chunk=16)
    follow(model, cut, *prompt.values(), STEPS)
    assert cut.kept(0)[0][0] == [*range(25, 36)]


def test_what_is_taken_back_is_counted_without_padding():
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    left = Reading.plain(valid).drop(3)
    assert left.given.tolist() == [3, 0] and torch.equal(left.valid, valid[:, :3])


def test_forks_files_rows_and_crops():
    model, prompt = subject("llama"), tokens(30, 21)
    cache = kvfold.Cache(model, reading(ROWS))
    follow(model, cache, *prompt.values(), STEPS[:, :3])
    fork, mask = cache.fork(), grow(prompt["attention_mask"], 4)
    with cache.tentative():
        feed(model, cache, STEPS[:, 4:5], mask)
    expected = feed(model, cache, STEPS[:, 3:4], mask)
    assert torch.equal(feed(model, fork, STEPS[:, 3:4], mask), expected)
    cache.crop(-1)
    assert cache.get_seq_length() == 33 and cache.kept(0)[1][0] == [2, 3, 20, 21, 22, 23]
    torch.testing.assert_close(feed(model, cache, STEPS[:, 3:4], mask), expected)
    cache.crop(33)  # to this length
    cache.reorder_cache(torch.tensor([1, 0]))
    turned = feed(model, cache, STEPS[:, 3:4].flip(0), mask.flip(0))
    torch.testing.assert_close(turned, expected.flip(0))
    with pytest.raises(ValueError, match="crop takes back 5 tokens, but 6 columns are a prompt read as a whole"):
        cache.crop(-5)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.kept(0) == [[[*ROWS[0], 30, 31, 32, 33]] * 2]
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.reading is None


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_saved_and_loaded(name, tmp_path):
    model, prompt = subject(name), tokens(30, 21)
    cache = kvfold.Cache(model, "specpc(budget=9, window=2, kernel=1)")
    follow(model, cache, *prompt.values(), STEPS[:, :3])
    cache.save(tmp_path / "x")
    loaded = kvfold.Cache.load(tmp_path / "x", model)
    mask = grow(prompt["attention_mask"], 4)
    assert torch.equal(feed(model, loaded, STEPS[:, 3:4], mask), feed(model, cache, STEPS[:, 3:4], mask))
    assert loaded.kept(cache.paged[0].layer) == cache.kept(cache.paged[0].layer)


@contextmanager
def failing(module, error):
    """Calls of `module` raise."""

    def fail(module, args):
        raise error

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("method", ["chosen", "full", "kvzip(budget=9)"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_a_call_that_fails_before_any_layer_has_stored(name, method):
    model, prompt = build(name), tokens(30, 30) if name == "qwen3-next" else tokens(30, 21)
    caches = [kvfold.Cache(model, reading(ROWS) if method == "chosen" else method) for _ in range(2)]
    layers, wide = model.model.layers, torch.ones(2, 35)
    for place, error in ((layers[0], KeyboardInterrupt()), (model.get_input_embeddings(), MemoryError())):
        with failing(place, error), pytest.raises(type(error)):
            feed(model, caches[0], *prompt.values())
        assert caches[0].get_seq_length() == 0 and caches[0].text_tokens is None
    if name == "llama":
        with pytest.raises(ValueError, match="attention_mask of shape"):
            feed(model, caches[0], prompt["input_ids"], wide)
    first, second = (follow(model, cache, *prompt.values(), STEPS[:, :2]) for cache in caches)
    assert torch.equal(first, second)
    mask = grow(prompt["attention_mask"], 3)
    with failing(layers[0], KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):  # a generated token
        feed(model, caches[0], STEPS[:, 2:3], mask)
    assert caches[0].get_seq_length() == 32
    assert torch.equal(*(feed(model, cache, STEPS[:, 2:3], mask) for cache in caches))


@pytest.mark.parametrize("prefill_chunk", [None, 16])
@pytest.mark.parametrize("rows", [ROWS, TWICE], ids=["fewer", "twice"])
@pytest.mark.parametrize("where", ["a layer", "the last layer's end", "the head"])
def test_a_call_that_fails_in_the_middle_says_so_until_the_cache_is_reset(where, rows, prefill_chunk, tmp_path):
    model, prompt = build("gemma3"), tokens(30, 21)
    layers = model.model.layers
    place = {"a layer": layers[1], "the last layer's end": layers[-1].mlp, "the head": model.lm_head}[where]
    cache, fresh = (kvfold.Cache(model, reading(rows), prefill_chunk=prefill_chunk) for _ in range(2))
    want = follow(model, fresh, *prompt.values(), STEPS)
    with failing(place, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        feed(model, cache, *prompt.values())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"failed when layers had already stored .* call cache.reset\(\)"):
            feed(model, cache, *prompt.values())
    with pytest.raises(RuntimeError, match=r"failed when layers had already stored"):
        cache.save(tmp_path / "c")
    cache.reset()
    cache.save(tmp_path / "c")
    assert torch.equal(follow(model, cache, *prompt.values(), STEPS), want)


def test_a_method_that_fails_when_the_prompt_is_over_has_failed_in_the_middle():
    @kvfold.method("test-failing", title="Failing", kind="evict")
    @dataclass(frozen=True)
    class Failing(Method):
        def after_prompt(self, prompt):
            raise MemoryError

    model, prompt = subject("llama"), tokens(30, 21)
    cache = kvfold.Cache(model, Failing())
    with pytest.raises(MemoryError):
        feed(model, cache, *prompt.values())
    with pytest.raises(RuntimeError, match=r"call cache\.reset"):
        feed(model, cache, STEPS[:, :1], grow(prompt["attention_mask"]))


def test_what_a_failed_call_left_can_be_cropped_away_and_a_tentative_one_leaves_nothing():
    model, prompt = build("llama"), tokens(30, 21)
    caches = [kvfold.Cache(model, "full") for _ in range(2)]
    for cache in caches:
        feed(model, cache, *prompt.values())
    mask = grow(prompt["attention_mask"])
    for last, undo in ((0, lambda: None), (1, lambda: caches[0].crop(30))):
        block = nullcontext() if last else caches[0].tentative()
        with block, failing(model.model.layers[1].mlp, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            feed(model, caches[0], STEPS[:, :1], mask)
        undo()
    assert torch.equal(*(feed(model, cache, STEPS[:, :1], mask) for cache in caches))


def test_what_cannot_be():
    model, prompt = subject("llama"), tokens(30, 21)
    with pytest.raises(ValueError, match="call the model with input_ids"), torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 5, 64), past_key_values=kvfold.Cache(model, reading(ROWS)))
    with pytest.raises(ValueError, match="arguments by name, but 2 came without"), torch.no_grad():
        model(*prompt.values(), past_key_values=kvfold.Cache(model, reading(ROWS)))
    with pytest.raises(ValueError, match="can't give labels"), torch.no_grad():
        model(**prompt, labels=prompt["input_ids"], past_key_values=kvfold.Cache(model, reading(ROWS)))
    with pytest.raises(ValueError, match="no assisted decoding"):
        cache = kvfold.Cache(model, reading(ROWS[:1]))
        ids = prompt["input_ids"][:1]
        model.generate(ids, past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="reads a prompt in its own way"):
        prefill_many(model, prompt, [kvfold.Cache(model, reading(ROWS))])
    with pytest.raises(ValueError, match="two stages that choose what the model reads"):
        reading(ROWS) | reading(ROWS)
