"""MiKV against its policy, its balancer and a loop over the numbers of a token."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import BALANCER, POSITION, Balanced, Chunk, Spec
from kvfold.formats.balanced import BalancedSegment
from kvfold.methods.mikv import MiKV, balancer
from models import dynamic, feed, follow, greedy, grow, reference, subject, tokens
from views import random_view

STEPS = torch.arange(5, 25).view(2, 10)

ALL = torch.ones(1, 1, dtype=torch.bool)


def parts(cache, layer: int = 0) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Text positions of the important tokens and of the others, by row and head."""
    found = []
    for form, segment in cache.paged[layer].segments:
        chunk = segment.dense()
        places = [
            [sorted(chunk.positions[b, h][chunk.valid[b, h]].tolist()) for h in range(chunk.valid.shape[1])]
            for b in range(len(chunk.valid))
        ]
        found.append((isinstance(form, Balanced), places))
    return tuple(next((x for coded, x in found if coded == low), [[[]] * 2] * 2) for low in (False, True))


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """2^bits steps from the least to the most of these numbers."""
    low, high, most = x.min(), x.max(), 2**bits - 1
    scale = (high - low) / most if high > low else torch.tensor(1.0)
    return low + scale * ((x - low) / scale).clamp(0, most).round()


def stored(keys: torch.Tensor, form: Balanced, told: torch.Tensor | None = None) -> BalancedSegment:
    """Keys (T, D) of one head, also as values."""
    at = torch.arange(len(keys), dtype=torch.int32).view(1, 1, -1)
    segment = form.open(Spec(1, 1, keys.shape[1], keys.shape[1], keys.dtype, keys.device))
    if told is not None:
        segment.hear({BALANCER: told[None, None]}, ALL)
    wide = keys[None, None]
    segment.append(Chunk(wide, wide, torch.ones(1, 1, len(keys), dtype=torch.bool), {POSITION: at}))
    return segment


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_token_against_a_loop(bits):
    keys = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    share = torch.rand(16, generator=torch.Generator().manual_seed(1)) * 3 + 0.2
    found = stored(keys, Balanced(bits), share).dense()
    for token, (key, value) in enumerate(zip(found.keys[0, 0], found.values[0, 0], strict=True)):
        for half in (slice(0, 8), slice(8, 16)):
            assert_close(key[half], rounded(keys[token, half] * share[half], bits) / share[half])
            assert_close(value[half], rounded(keys[token, half], bits))


def test_the_balancer_shares_out_what_stands_out():
    view = random_view(B=2, H=2, G=3, T=24, D=8, left_pad=(0, 5))
    view.queries.states[:] *= 0.1
    view.keys[:] *= 0.1
    view.queries.states[0, 4, 7, 3], view.keys[0, 1, 9, 3] = -100.0, 1.0  # a head of the second group
    view.queries.states[1, :, :5], view.keys[1, :, :5] = 9e9, 9e9  # padding
    view.keys[1, 0, :, 2] = 0.0
    share = balancer(view)
    assert share[0, 1, 3] == pytest.approx(10.0)
    assert share[1, 0, 2] == 1.0 and (share < 20).all() and (share > 0).all()
    keys, asked = view.keys[0] * share[0, :, None], view.queries.states[0].view(2, 3, -1, 8) / share[0, :, None, None]
    assert keys[1, :, 3].abs().max() == pytest.approx(10.0) == asked[1, :, :, 3].abs().max()
    want = torch.einsum("hgqd,htd->hgqt", view.queries.states[0].view(2, 3, -1, 8), view.keys[0])
    assert_close(torch.einsum("hgqd,htd->hgqt", asked, keys), want, atol=1e-5, rtol=1e-5)


def test_an_outlier_of_queries_costs_less_where_it_is_balanced():
    rng = torch.Generator().manual_seed(3)
    keys, q = torch.randn(200, 32, generator=rng), torch.randn(1, 1, 1, 50, 32, generator=rng)
    q[..., 5] *= 50
    share = (q.abs().amax((0, 1, 2, 3)) / keys.abs().amax(0)).sqrt()
    errors = []
    for told in (None, share):
        found = stored(keys, Balanced(2), told).dense().keys[0, 0]
        errors.append(float((q[0, 0, 0] @ (found - keys).T).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_a_row_has_the_first_balancer_that_it_is_told_for_good():
    share = torch.full((16,), 2.0)
    segment = stored(torch.randn(5, 16), Balanced(), share)
    segment.hear({BALANCER: share[None, None] * 3}, ALL)
    assert torch.equal(segment.told[0, 0], share)
    late = stored(torch.randn(5, 16), Balanced())
    before = late.dense().keys
    late.hear({BALANCER: share[None, None]}, ALL)
    assert torch.equal(late.dense().keys, before) and late.told.eq(1).all()
    empty = Balanced().open(Spec(2, 1, 16, 16, torch.float32, torch.device("cpu")))
    empty.hear({BALANCER: torch.stack([share, share])[:, None]}, torch.tensor([[True], [False]]))
    assert empty.told[:, 0, 0].tolist() == [2.0, 0.0]
    joined = empty.select(np.array([1, 0, 0]))
    joined.join(empty)
    assert joined.told[:, 0, 0].tolist() == [0.0, 2.0, 2.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="told=\\['age'\\]"):
        empty.hear({"age": share}, ALL.expand(2, 1))


def test_its_important_tokens_are_those_that_the_policy_keeps():
    model, prompt = subject("llama"), tokens(60, 42)
    mine, theirs = kvfold.Cache(model, "mikv(ratio=0.5)"), kvfold.Cache(model, "h2o(budget=0.5)")
    for cache in (mine, theirs):
        feed(model, cache, *prompt.values())
    for layer in range(3):
        important, low = parts(mine, layer)
        assert important == theirs.kept(layer)
        for b, length in enumerate((60, 42)):
            for h in range(2):
                assert sorted(important[b][h] + low[b][h]) == list(range(length))


def test_a_token_goes_once_and_its_codes_stay():
    model, prompt = subject("llama"), tokens(40, 31)
    cache = kvfold.Cache(model, "mikv(ratio=0.3)")
    feed(model, cache, *prompt.values())
    before = None
    for step in range(8):
        feed(model, cache, STEPS[:, step : step + 1], grow(prompt["attention_mask"], step + 1))
        segment = next(segment for form, segment in cache.paged[1].segments if isinstance(form, Balanced))
        held = {
            (b, h, int(segment.dense().positions[b, h, t])): segment.plane("keys")[b, h, t].tolist()
            for b, h, t in segment.valid().nonzero().tolist()
        }
        important, low = parts(cache, 1)
        for b, length in enumerate((41 + step, 32 + step)):
            assert all(len(heads) == int(0.3 * length) for heads in important[b])
            assert all(sorted(x + y) == list(range(length)) for x, y in zip(important[b], low[b], strict=True))
        assert before is None or (held.items() >= before.items() and len(held) > len(before) - 1)
        before = held


def test_a_ratio_of_one_is_the_full_cache():
    prompt = tokens(20, 13)
    got = follow(subject("llama"), kvfold.Cache(subject("llama"), "mikv(ratio=1.0)"), *prompt.values(), STEPS)
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), STEPS)
    assert_close(got, truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("bits", "share"), [(2, 2.5), (4, 4.5)])
def test_bytes(bits, share):
    """bits and two float16 for each half of 128 numbers: the card's 2.5 bits of 16, and a position."""
    keys = torch.randn(2048, 128).bfloat16()
    held = stored(keys, Balanced(bits)).nbytes / (2048 * 128 * 2 * 2)
    assert share / 16 < held < share / 16 + 4 / 512 + 0.003


def test_a_policy_that_acts_on_prompts_alone_lets_generated_tokens_stay(tmp_path):
    model, prompt = subject("llama"), tokens(40, 31)
    cache = kvfold.Cache(model, "mikv(ratio=0.3, policy='snapkv(window=4)')")
    greedy(model, cache, *prompt.values(), 5)
    assert [len(head) for head in parts(cache)[0][0]] == [16, 16] and not cache.rows.listens("after_decode")
    cache.save(tmp_path / "c")
    loaded = kvfold.Cache.load(tmp_path / "c", model)
    after = grow(prompt["attention_mask"], 5)
    assert_close(feed(model, loaded, STEPS[:, :1], after), feed(model, cache, STEPS[:, :1], after), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio=1.5"), ({"bits": 5}, "bits=5"), ({"policy": "kivi"}, "policy='kivi' must be a method"),
        ({"policy": "kvzip"}, "policy='kvzip'"), ({"balance": 2}, "balance=2"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MiKV(**options)


def test_groups_must_divide_a_head():
    with pytest.raises(ValueError, match="groups=3 must divide the key size 16"):
        Balanced(groups=3).open(Spec(1, 1, 16, 16, torch.float32, torch.device("cpu")))
