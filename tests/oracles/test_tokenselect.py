"""TokenSelect against its card: the vote, what it picks, where what is read stands, and when a choice is used again."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold import ops
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Spec
from kvfold.hf.rope import find_ropes
from kvfold.methods.tokenselect import TokenSelect
from kvfold.selectors import Alike, Always, Keys, Selection, Vote
from kvfold.selectors.keys import KeysOf
from kvfold.testing import steps as forced
from models import dynamic, feed, follow, grow, reference, subject, tokens

H, G, D = 2, 2, 16


def spec(rows: int = 1) -> Spec:
    rope = find_ropes(subject("llama"))[0]
    return Spec(rows, H, D, D, torch.float32, torch.device("cpu"), rope=rope, group=G)


def stored(form: Indexed, t: int, seed: int = 0):
    """A segment of so many random tokens, and its keys (as they attend) and values."""
    rng = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, H, t, D, generator=rng) for _ in range(2))
    places = torch.arange(t, dtype=torch.int32).expand(1, H, t)
    segment = form.open(spec())
    segment.append(Chunk(keys, values, torch.ones(1, H, t, dtype=torch.bool), {POSITION: places}), even=True)
    return segment, keys, values


def worth(scores: list[list[float]], vote: Vote) -> torch.Tensor:
    """Of query heads of one KV head."""
    given = torch.tensor(scores)[None, None]
    return vote.worth(given, torch.ones(given.shape[0], 1, given.shape[-1], dtype=torch.bool), 4)[0, 0, 0]


def test_oracle_1_a_soft_vote_is_no_sum_of_logits():
    logits = [[100.0, 90, 0, 0], [0.0, 0, 1, 0]]
    soft = worth(logits, Vote("sum", softmax=True, scaled=False))
    assert_close(soft, torch.tensor([1.175, 0.175, 0.475, 0.175]), atol=1e-3, rtol=0)
    assert sorted(soft.topk(2).indices.tolist()) == [0, 2]
    assert sorted(worth(logits, Vote("sum")).topk(2).indices.tolist()) == [0, 1]


def test_oracle_2_sinks_the_best_and_recent_ones(monkeypatch):
    votes = [9.0, 0.1, 0.9, 0.0, 0.3, 0.2, 0.8, 0.0, 9.0, 9.0]
    held = Keys(2).open(spec())
    monkeypatch.setattr(held, "scores", lambda asked, units: torch.tensor(votes).expand(1, H, G, 10))
    always = Always(sinks=1, recent=1)  # and the newest: two local ones, as the paper counts
    chosen, _ = Selection(Keys(2), 6, Vote("sum", layer=True), always).choose(
        held, torch.zeros(1, H, G, D), np.full((1, H), 10), np.array([10])
    )
    assert chosen.mask.shape == (1, H, 1, 10)
    for head in range(H):
        assert chosen.mask[0, head, 0].nonzero()[0].tolist() == [0, 2, 4, 6, 8, 9]


def test_oracle_2_what_is_read_stands_side_by_side():
    """Positions 0 ... 5, and the query at 5: the same numbers as a cache that holds those tokens alone."""
    selection = Selection(Keys(4), 6, Vote("sum", layer=True, softmax=True, scaled=False), Always(1, 1), slots=True)
    segment, keys, values = stored(Indexed(Dense(), selection), 30)
    rng, rope = torch.Generator().manual_seed(9), spec().rope
    q, k, v = (torch.randn(1, H, n, 1, D, generator=rng) for n in (G, 1, 1))
    out, *_ = segment.step(q, k[:, :, 0], v[:, :, 0], torch.tensor([[30]]), 0.25, weights=False)
    keys, values = torch.cat([keys, k[:, :, 0]], 2), torch.cat([values, v[:, :, 0]], 2)
    place = torch.arange(31, dtype=torch.int32).expand(1, H, 31)
    plain = rope.shift(keys, -place)  # before RoPE
    asked = rope.shift(q[:, :, :, 0], torch.full((1, H, G), 4 - 30, dtype=torch.int32))
    soft = (asked @ plain[:, :, 1:29].mT).softmax(-1).sum((1, 2))[0]
    read = sorted([0, *(soft.topk(3).indices + 1).tolist(), 29, 30])
    slots = torch.arange(6, dtype=torch.int32).expand(1, H, 6)
    near = rope.shift(plain[:, :, read], slots)
    asks = rope.shift(q[:, :, :, 0], torch.full((1, H, G), 5 - 30, dtype=torch.int32))
    want = (asks @ near.mT * 0.25).softmax(-1) @ values[:, :, read]
    assert_close(out[:, :, :, 0], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [TokenSelect(64), TokenSelect(1.0)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "yarn"])
def test_oracle_3_a_budget_of_all_there_is_is_full_attention(family, method):
    prompt, said = tokens(40, 23), forced(2, 8)
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    got = follow(subject(family), kvfold.Cache(subject(family), method), *prompt.values(), said)
    assert_close(got, dense, atol=1e-4, rtol=0)


def test_oracle_4_heads_vote_alike_and_what_is_orthogonal_says_nothing():
    rng = torch.Generator().manual_seed(2)
    scores = torch.randn(1, H, G, 20, generator=rng)
    asked, vote = torch.ones(1, H, 20, dtype=torch.bool), Vote("sum", layer=True, softmax=True, scaled=False)
    found = vote.worth(scores, asked, D)
    assert_close(vote.worth(scores.flip(1), asked, D), found)
    assert_close(vote.worth(scores.flip(2), asked, D), found)
    # What every key has more says as much to each of them.
    assert_close(vote.worth(scores + 3.0, asked, D), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_oracle_5_how_often_a_choice_is_made(family, monkeypatch):
    """Never used again: what choosing at each step gives. Always: one choice for each layer and text.

    Choosing at each step is one operation, where nothing is used again.
    """
    prompt, said, options = tokens(60, 41), forced(2, 10), {"budget": 16, "sinks": 2, "recent": 4}

    def run(reuse: float) -> tuple[torch.Tensor, int]:
        asked, plain, whole = [], KeysOf.scores, ops.step_keys
        monkeypatch.setattr(KeysOf, "scores", lambda self, *given: asked.append(1) or plain(self, *given))
        monkeypatch.setattr(ops, "step_keys", lambda *given: asked.append(1) or whole(*given))
        cache = kvfold.Cache(subject(family), TokenSelect(**options, reuse=reuse))
        out = follow(subject(family), cache, *prompt.values(), said)
        monkeypatch.undo()
        return out, len(asked)

    (never, each), (always, once) = run(2.0), run(-1.0)
    layers = subject(family).config.num_hidden_layers
    assert each == layers * 10 and once == layers
    assert torch.equal(run(1.5)[0], never)
    assert_close(always[:, :2], never[:, :2])  # the first choice is the same
    assert not torch.allclose(always, never, atol=1e-3)


def test_a_choice_is_used_again_until_queries_differ():
    """By the cosine of all heads' queries, before RoPE; tokens that are always read are found anew."""
    rope = spec().rope
    form = Indexed(Dense(), Selection(Keys(4), 6, Vote("sum", layer=True), Always(1, 1), reuse=Alike(0.9)))
    segment, *_ = stored(form, 30)
    rng = torch.Generator().manual_seed(3)
    plain = torch.randn(1, H, G, D, generator=rng)

    def step(place: int, query: torch.Tensor) -> np.ndarray:
        q = rope.shift(query, torch.full((1, H, G), place, dtype=torch.int32))[:, :, :, None]
        k, v = (torch.randn(1, H, 1, D, generator=rng) for _ in range(2))
        segment.step(q, k, v, torch.tensor([[place]]), 0.25, weights=False)
        return segment.choice

    first = step(30, plain)
    again = step(31, plain * 2)  # points the same way, from another place
    assert again.made.tolist() == first.made.tolist() == [31]
    assert (again.units[..., :31] == first.units).all() and not again.units[..., 31:].any()
    other = step(32, -plain)
    assert other.made.tolist() == [33]
    # What it reads then is what one would choose that knows of no earlier choice.
    asked = rope.shift(-plain, torch.full((1, H, G), 32, dtype=torch.int32))
    anew = form.selection.choose(segment.index, asked, segment.counts(), segment.seen)[1]
    assert (other.units == anew.units).all() and not (other.units[..., :31] == first.units).all()
    # Rows that lose a token choose anew, whatever they ask.
    valid, _ = segment.columns()
    segment.keep(valid & (torch.arange(33) != 5), {})
    assert step(33, -plain).made.tolist() == [34]


def test_exempt_tokens_shrink_with_the_budget():
    """A tenth of any length is a tenth of it, and most of that is chosen."""
    selection = TokenSelect(0.1).selection(kvfold.views.Site(0, 0, (0,), 1))
    for length, exempt in ((300, 7), (2000, 48), (6000, 143), (60000, 641)):
        room = selection.room(np.array([length]))
        always = selection.always.units(1, np.array([[length]]), room)
        assert room[0] == length // 10 and always.sum() == exempt


def test_it_must_know_how_keys_turn():
    with pytest.raises(ValueError, match="needs the model's RoPE, and layer 0 has none"):
        Keys(4).open(Spec(1, 1, 8, 8, torch.float32, torch.device("cpu")))


def test_heads_that_hold_other_tokens_choose_for_themselves():
    with pytest.raises(ValueError, match=r"let all heads read the same tokens, and .*snapkv.* may leave each head"):
        kvfold.parse("snapkv(budget=0.5) | tokenselect")
    model, prompt = subject("llama"), tokens(80, 70)
    cache = kvfold.Cache(model, "snapkv(budget=0.5) | tokenselect(budget=16, sinks=2, recent=4, vote='group')")
    feed(model, cache, *prompt.values())
    assert feed(model, cache, forced(2, 1), grow(prompt["attention_mask"])).isfinite().all()
