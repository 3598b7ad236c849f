"""Methods that act at intervals of generated tokens: what they do is what they would do to a further turn."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfold
from kvfold.layer.recent import Recent
from kvfold.methods._intervals import interval_of, left_for
from kvfold.methods.base import Pipeline
from kvfold.methods.decoding import Decoding
from kvfold.views import Queries
from models import feed, subject, tokens
from saying import kept, read, say

FEW = [
    "kvfold(budget=20, interval=6)",
    "decoding(snapkv, budget=24, interval=3)",
    "decoding(kvmerger, budget=13, interval=4)",
]


@pytest.mark.parametrize(
    "text", [*FEW, "kvfold(budget=1)", "kvfold(budget=9, interval=0)", "decoding(h2o, budget=0.3)"]
)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3), extra=st.integers(1, 40))
def test_the_budget_holds_at_every_step(text, lengths, extra):
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), text)
    budget, period = cache.method.budget, cache.method.period
    prompt = tokens(*lengths)
    mask = prompt["attention_mask"]
    feed(model, cache, *prompt.values())
    for number, step in enumerate(tokens(*[extra] * len(lengths))["input_ids"].T, 1):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        feed(model, cache, step[:, None], mask)
        for row, seen in enumerate(cache.rows.seen.tolist()):
            held = sum(int(core.counts()[row].sum()) for core in cache.paged) / (len(cache.paged) * 2)
            most = budget if isinstance(budget, int) else budget * seen + period
            assert held <= most + (0 if period else number), f"{held} of {most} tokens, row {row}, step {number}"
            if not period:
                assert held == min(budget, seen - number) + number  # what is generated stays


@pytest.mark.parametrize("text", FEW)
def test_rows_are_alone(text):
    """A padded row gives what it gives alone, though its intervals end elsewhere in the text."""
    model, steps = subject("llama"), tokens(20, 20, 20)["input_ids"]
    prompt = tokens(31, 14, 22)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    cache = kvfold.Cache(model, text)
    feed(model, cache, ids, mask)
    both = say(model, cache, steps, mask)
    for row in range(3):
        own = kvfold.Cache(model, text)
        read(model, own, ids[row : row + 1][:, mask[row].bool()])
        torch.testing.assert_close(say(model, own, steps[row : row + 1])[0], both[row], atol=2e-4, rtol=0)
        assert [layer[0] for layer in kept(own)] == [layer[row] for layer in kept(cache)]


@pytest.mark.parametrize("text", FEW)
def test_rows_with_other_intervals_join(text):
    """Rows whose intervals differ in length and in where they stand: each goes on as it would alone."""
    model, more = subject("llama"), tokens(17, 17)["input_ids"]
    texts, prompts, said = (text, "decoding(h2o, budget=9, interval=3)"), (tokens(30), tokens(21)), (7, 1)
    caches, alone = [], []
    for method, prompt, count in zip(texts, prompts, said, strict=True):
        for into in (caches, alone):
            into.append(kvfold.Cache(model, method))
            read(model, into[-1], prompt["input_ids"])
            say(model, into[-1], tokens(count)["input_ids"])
    joined = caches[0]
    joined.join(caches[1])
    width = joined.get_seq_length()
    mask = torch.zeros(2, width, dtype=torch.int64)
    for row, seen in enumerate(joined.rows.seen.tolist()):
        mask[row, width - seen :] = 1
    both = say(model, joined, more, mask)
    for row, own in enumerate(alone):
        torch.testing.assert_close(say(model, own, more[row : row + 1])[0], both[row], atol=2e-4, rtol=0)
        assert [layer[0] for layer in kept(own)] == [layer[row] for layer in kept(joined)]


@pytest.mark.parametrize("text", FEW)
@pytest.mark.parametrize("said", [1, 3, 4, 9])
def test_a_file_and_a_fork_go_on(text, said, tmp_path):
    """In the middle of an interval: the next cut sees the queries of before the file, bit for bit."""
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), text)
    feed(model, cache, *tokens(30, 22).values())
    mask = tokens(30, 22)["attention_mask"]
    steps = tokens(20, 20)["input_ids"]
    say(model, cache, steps[:, :said], mask)
    mask = torch.cat([mask, torch.ones(2, said, dtype=torch.int64)], 1)
    cache.save(tmp_path / "cache.safetensors")
    loaded, forked = kvfold.Cache.load(tmp_path / "cache.safetensors", model), copy.copy(cache)
    wanted = say(model, cache, steps[:, said:], mask)
    for other in (loaded, forked):
        assert torch.equal(say(model, other, steps[:, said:], mask), wanted)
        assert kept(other) == kept(cache)


@pytest.mark.parametrize("text", FEW)
def test_beams_take_their_queries_along(text):
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), text)
    read(model, cache, tokens(30, 30)["input_ids"])
    first = tokens(2, 2)["input_ids"]
    say(model, cache, first)
    cache.reorder_cache(torch.tensor([1, 1]))
    alone = kvfold.Cache(model, text)
    read(model, alone, tokens(30, 30)["input_ids"][1:])
    say(model, alone, first[1:])
    steps = tokens(9)["input_ids"]
    both = say(model, cache, steps.expand(2, -1))
    one = say(model, alone, steps)
    torch.testing.assert_close(both[0], one[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(both[1], one[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("text", FEW)
def test_a_crop_within_an_interval_never_was(text):
    """Tokens that were taken back before a cut leave no trace in it."""
    model, steps = subject("llama"), tokens(14)["input_ids"]
    found = []
    for extra in (0, 1):
        cache = kvfold.Cache(model, text)
        read(model, cache, tokens(30)["input_ids"])
        if extra:
            say(model, cache, tokens(40)["input_ids"][:, -extra:])
            cache.crop(30)
        found.append(say(model, cache, steps))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


def test_a_crop_behind_cuts_begins_the_interval_anew():
    """What was cut does not come back; the tokens that come instead are cut when they are as many again."""
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "decoding(snapkv, budget=12, interval=4)")
    read(model, cache, tokens(30)["input_ids"])
    say(model, cache, tokens(9)["input_ids"])
    cache.crop(31)
    for step in tokens(14)["input_ids"].T:
        read(model, cache, step[:, None])
        assert all(bool((core.counts() <= 12).all()) for core in cache.paged)


def test_an_interval_begins_behind_a_prompt():
    """Tokens that waited when a further prompt came are cut with it, and four more are waited for."""
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "decoding(snapkv, budget=12, interval=4)")
    held = []
    for length in (30, 1, 1, 9, 1, 1, 1, 1, 1):
        read(model, cache, tokens(length)["input_ids"])
        held.append(cache.kept_tokens)
    assert held == [9, 10, 11, 9, 10, 11, 12, 9, 10]


def test_a_conversation_stays_under_its_limit():
    """Fifty turns, each with a question and an answer."""
    model = subject("llama")
    for text in FEW:
        cache = kvfold.Cache(model, text)
        for turn in range(50):
            read(model, cache, tokens(1 + turn % 7)["input_ids"]) if turn % 7 else say(
                model, cache, tokens(1)["input_ids"]
            )
            for step in tokens(1 + turn % 5)["input_ids"].T:
                read(model, cache, step[:, None])
                each = [core.counts().mean() for core in cache.paged]
                assert np.mean(each) <= cache.method.budget, f"{text}: {each} in turn {turn}"


def test_assisted_decoding_keeps_the_limit():
    """Drafts that are refused never count; where several tokens pass the end of an interval, it ends behind them."""
    model, draft = subject("llama"), subject("llama")
    for text in FEW:
        cache = kvfold.Cache(model, text)
        ids = tokens(30)["input_ids"]
        model.generate(
            ids, past_key_values=cache, assistant_model=draft, max_new_tokens=40, min_new_tokens=40, do_sample=False
        )
        drafted = draft.generation_config.num_assistant_tokens or 20
        assert np.mean([core.counts().mean() for core in cache.paged]) <= cache.method.budget + drafted + 1


def test_bytes_count_the_queries():
    """The remembered queries are in nbytes, and in those of the rows; a reset frees them."""
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "decoding(snapkv, budget=12, interval=4)")
    read(model, cache, tokens(30, 30)["input_ids"])
    before = cache.nbytes
    say(model, cache, tokens(1, 1)["input_ids"])
    rings = [core.stored.recent for core in cache.paged]
    assert all(ring is not None and ring.size == 4 for ring in rings)
    own = sum(ring.states.nbytes + ring.lse.nbytes + ring.at.nbytes + ring.since.nbytes for ring in rings)
    assert cache.nbytes >= before + own
    bare = [replace_recent(core) for core in cache.paged]
    assert own == bare[0]
    cache.reset()
    assert all(core.stored.recent is None for core in cache.paged)


def replace_recent(core):
    """Bytes that a layer's cache loses without its ring, for all layers alike."""
    whole = core.nbytes
    core.stored.recent, ring = None, core.stored.recent
    without = core.nbytes
    core.stored.recent = ring
    return (whole - without) * len(core.site.paged)


@given(
    size=st.integers(1, 7), counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    starts=st.lists(st.integers(0, 9), min_size=2, max_size=2),
)  # fmt: skip
def test_a_ring_gives_the_last_queries_back(size, counts, starts):
    """Passes of any length, rows that stand at different places of their text."""
    seen, said = np.array(starts), [[], []]
    ring = Recent.empty(2, size, torch.zeros(2, 3, 1, 4))
    for count in counts:
        states, lse = torch.randn(2, 3, count, 4), torch.randn(2, 3, count)
        seen = seen + count
        positions = torch.from_numpy(seen[:, None] - count + np.arange(count)).int()
        ring.put(Queries(states, torch.ones(2, count, dtype=torch.bool), lse, positions), seen)
        for row in range(2):
            said[row] += [(states[row, :, i], lse[row, :, i]) for i in range(count)]
    many = min(size, sum(counts))
    for again in (ring, ring.resized(size + 3), Recent.joined(ring, None, (2, 1)).select(np.array([0, 1]))):
        asked = again.asked(many, seen, np.full((2, 3), 99))
        for row in range(2):
            assert torch.equal(asked.states[row], torch.stack([state for state, _ in said[row][-many:]], 1))
            assert torch.equal(asked.lse[row], torch.stack([lse for _, lse in said[row][-many:]], 1))
            assert asked.positions[row].tolist() == list(range(seen[row] - many, seen[row]))


def test_where_single_tokens_do_not_go_only_the_prompt_is_folded():
    """In pages of codes kvfold leaves what is generated, and says so; asked for an interval, it refuses."""
    made = kvfold.parse("kvfold(budget=16) | kivi(bits=4)")
    assert isinstance(made, Pipeline) and made.period == 0 and "interval=0" in str(made)
    assert kvfold.parse("kvfold(budget=32) | kivi(bits=4, requantise=True)").period == 2
    assert kvfold.parse("kvfold(budget=16) | zipcache").period == 0
    assert kvfold.parse("kvfold(budget=32) | turboquant").period == 2
    assert kvfold.parse("h2o | kvfold(budget=32)").period == 0  # at every token there is nothing left to gather
    for text in ("kvfold(budget=16, interval=4) | kivi", "decoding(snapkv, budget=16) | kivi"):
        with pytest.raises(ValueError, match="requantise"):
            kvfold.parse(text)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("decoding(snapkv, interval=0)", "interval=0"), ("decoding(snapkv, interval=-1)", "interval=-1"),
        ("decoding(snapkv, budget=10, interval=6)", "at most half"), ("kvfold(budget=10, interval=6)", "at most half"),
        ("decoding(kvzip)", "kvzip"), ("decoding(kvfold)", "after_interval"), ("decoding(d2o)", "after_forward"),
        ("decoding(full)", "full"), ("decoding(look-m)", "look-m"), ("decoding(snapkv(budget=3))", "leave the budget"),
        ("decoding(nobody)", "nobody"), ("decoding(snapkv, h2o)", "by name"),
        ("decoding(snapkv, score='h2o')", "twice"),
        ("snapkv(h2o)", "by name"), ("decoding(3)", "3"),
        ("decoding(score=snapkv)", "a text in quotes"), ("tova(budget=20) | decoding(snapkv)", "at every token"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        kvfold.parse(text)


def test_intervals_of_budgets():
    assert [interval_of(b) for b in (1, 7, 8, 128, 256, 512, 5000, 0.5)] == [1, 1, 1, 8, 16, 32, 64, 64]
    assert [left_for(b, n) for b, n in ((128, 16), (1, 1), (12, 4), (0.5, 64), (9, 0))] == [113, 1, 9, 0.5, 9]
    assert str(kvfold.parse("decoding(snapkv(window=4), interval=5)")) == str(
        Decoding(score="snapkv(window=4)", interval=5)
    )
    assert kvfold.parse(str(Decoding(score="expected-attention"))) == kvfold.parse("decoding(expected-attention)")
    assert replace(Decoding(), budget=1.0).period == 0


def test_rows_of_one_method_with_other_intervals_are_alone():
    """After a join the same method's rows may have waited for different numbers of tokens: contexts are not shared."""
    model, text = subject("llama"), "decoding(windowkv(group=2, suffix=2), budget=24, interval=4)"

    def first():
        cache = kvfold.Cache(model, text)
        read(model, cache, tokens(90)["input_ids"])
        say(model, cache, tokens(3)["input_ids"])
        return cache

    def second():
        cache = kvfold.Cache(model, text)
        read(model, cache, tokens(60)["input_ids"])
        say(model, cache, tokens(6)["input_ids"])
        cache.crop(62)
        say(model, cache, tokens(1)["input_ids"])
        return cache

    more, joined, alone = tokens(5, 5)["input_ids"], first(), (first(), second())
    joined.join(second())
    mask = torch.zeros(2, joined.get_seq_length(), dtype=torch.int64)
    for row, seen in enumerate(joined.rows.seen.tolist()):
        mask[row, mask.shape[1] - seen :] = 1
    both = say(model, joined, more, mask)
    for row, own in enumerate(alone):
        torch.testing.assert_close(say(model, own, more[row : row + 1])[0], both[row], atol=2e-4, rtol=0)
        assert [layer[0] for layer in kept(own)] == [layer[row] for layer in kept(joined)]


def test_tokens_without_decisions_ask_nothing_at_the_next_cut():
    """A block without decisions puts no query into the ring: the cut behind it sees those that are there, no others."""
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "decoding(snapkv, budget=12, interval=4)")
    read(model, cache, tokens(30)["input_ids"])
    with cache.undecided():
        say(model, cache, tokens(5)["input_ids"])
    seen, own = [], Recent.asked

    def asked(self, count, *rest):
        found = own(self, count, *rest)
        seen.append((found.positions.tolist(), [self.at[0, p % self.size] for p in found.positions[0].tolist()]))
        return found

    Recent.asked = asked
    try:
        say(model, cache, tokens(9)["input_ids"])
    finally:
        Recent.asked = own
    assert len(seen) == 2 * len(cache.paged)
    assert all(positions == [at] for positions, at in seen)
    assert cache.kept_tokens <= 12
