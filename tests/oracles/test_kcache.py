"""KCache against its card: all keys are asked, the values of few are read, and what that leaves out."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Kivi, Segment, Spec
from kvfold.formats.few_values import attend_values
from kvfold.methods.kcache import KCache
from kvfold.selectors import Heaviest, Unremembered, Vote
from kvfold.testing import steps as forced
from models import dynamic, feed, follow, reference, subject, tokens

H, G, D = 2, 3, 16


def choice(budget: int | float, heads: str = "sum", renormalize: bool = False) -> Heaviest:
    return Heaviest(Unremembered(1), budget, Vote(heads), renormalize=renormalize)


def segment(form, keys: torch.Tensor, values: torch.Tensor) -> Segment:
    b, h, t, d = keys.shape
    made = form.open(Spec(b, h, d, values.shape[-1], keys.dtype, keys.device, group=G))
    places = torch.arange(t, dtype=torch.int32).expand(b, h, t)
    made.append(Chunk(keys, values, torch.ones(b, h, t, dtype=torch.bool), {POSITION: places}), even=True)
    return made


def some(t: int = 100, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, H, G, 1, D, generator=rng)
    return q, torch.randn(1, H, t, D, generator=rng), torch.randn(1, H, t, D, generator=rng)


def by_definition(q, keys, values, chosen: torch.Tensor, renormalize: bool = False) -> torch.Tensor:
    """Head by head; `chosen` (B, H, G, T)."""
    weights = (q[:, :, :, 0] @ keys.mT * 0.25).softmax(-1)
    kept = weights * chosen
    kept = kept / kept.sum(-1, keepdim=True) if renormalize else kept
    return (kept @ values)[:, :, :, None]


@pytest.mark.parametrize(("renormalize", "found"), [(False, 1.117680), (True, 1.268941)])
def test_oracle_1_numbers(renormalize, found):
    logits, values = torch.tensor([2.0, 1, 0, -1]), torch.tensor([1.0, 2, 3, 4])
    held = segment(Dense(), logits[None, None, :, None], values[None, None, :, None])
    q, seen = torch.ones(1, 1, 1, 1, 1), np.array([4])
    out, lse, left = attend_values(held, q, 1.0, choice(2, renormalize=renormalize), seen, weights=True)
    assert_close(out.flatten(), torch.tensor([found]), atol=1e-6, rtol=0)
    share = torch.tensor([0.643914, 0.236883, 0, 0])
    assert_close(left.flatten(), share / (share.sum() if renormalize else 1), atol=1e-6, rtol=0)
    assert_close(lse.flatten(), logits[: 2 if renormalize else 4].logsumexp(0, keepdim=True))
    whole = attend_values(held, q, 1.0, choice(4, renormalize=renormalize), seen)[0]
    assert_close(
        whole.flatten(), torch.tensor([1.507347]), atol=1e-6, rtol=0
    )  # the card sums rounded weights: 1.507340


@pytest.mark.parametrize("method", [KCache(64), KCache(1.0), KCache(64, group="each", renormalize=True)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_oracle_2_a_budget_of_all_there_is_is_full_attention(method, family):
    prompt, said = tokens(40, 23), forced(2, 8)
    full = follow(subject(family), kvfold.Cache(subject(family), "full"), *prompt.values(), said)
    got = follow(subject(family), kvfold.Cache(subject(family), method), *prompt.values(), said)
    assert torch.equal(got, full)  # bit for bit
    dense = follow(reference(family), dynamic(reference(family)), *prompt.values(), said)
    assert_close(got, dense, atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads", ["sum", "max", "each"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_oracle_3_what_is_left_out_bounds_the_error(heads, renormalize):
    q, keys, values = some()
    held, seen = segment(Dense(), keys, values), np.array([100])
    picked = choice(9, heads, renormalize)
    out, _, left = attend_values(held, q, 0.25, picked, seen, weights=True)
    full, _, weights = held.attend(q, 0.25, weights=True)
    chosen = left[:, :, :, 0] > 0
    assert_close(out, by_definition(q, keys, values, chosen, renormalize), atol=1e-5, rtol=0)
    worth = weights[:, :, :, 0]
    worth = {"each": worth, "sum": worth.sum(2, keepdim=True), "max": worth.amax(2, keepdim=True)}[heads]
    best = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(9).indices, True)
    assert torch.equal(chosen, best.expand_as(chosen))
    lost = 1 - (weights[:, :, :, 0] * chosen).sum(-1)
    most = values.norm(dim=-1).amax(-1)[:, :, None]
    assert ((out - full)[:, :, :, 0].norm(dim=-1) <= (2 if renormalize else 1) * lost * most + 1e-5).all()


@pytest.mark.parametrize("heads", ["sum", "each"])
def test_oracle_4_more_values_are_the_same_and_others(heads):
    q, keys, values = some(200)
    held, seen, before = segment(Dense(), keys, values), np.array([200]), None
    _, _, weights = held.attend(q, 0.25, weights=True)
    for number in (16, 32, 64, 128):
        _, _, left = attend_values(held, q, 0.25, choice(number, heads), seen, weights=True)
        chosen = left > 0
        assert torch.equal(left[chosen], weights[chosen])  # those of full attention
        assert before is None or bool((chosen | ~before).all())
        assert (chosen.sum(-1) == number).all()
        before = chosen


def test_oracle_5_a_prompt_is_read_as_ever():
    prompt = tokens(60, 41)
    full, *few = (
        feed(subject("llama"), kvfold.Cache(subject("llama"), m), *prompt.values())
        for m in ("full", KCache(4), KCache(32))
    )
    assert all(torch.equal(each, full) for each in few)


@pytest.mark.parametrize("length", [50, 100, 400])
def test_oracle_6_as_many_values_at_any_length(length):
    """N of each KV head where a group reads together, and of each query head where they do not."""
    q, keys, values = some(length)
    held = segment(Dense(), keys, values)
    weights = held.attend(q, 0.25, weights=True)[2][:, :, :, 0]
    for heads, lists in (("sum", 1), ("each", G)):
        chosen = choice(12, heads).weigh(weights, held.columns()[0], np.array([length]))
        assert chosen.shape == (1, H, lists, length) and (chosen.sum(-1) == 12).all()


def test_the_first_layers_read_everything():
    cache = kvfold.Cache(subject("llama"), KCache(8))
    feed(subject("llama"), cache, *tokens(40).values())
    assert [isinstance(core.stored.segments[0][0], Indexed) for core in cache.paged] == [False, True, True]


def test_rows_that_read_all_are_left_alone():
    """Of a batch in which another one does not: bit for bit what `attend` gives."""
    rng = torch.Generator().manual_seed(3)
    valid = torch.ones(2, H, 40, dtype=torch.bool)
    valid[1, :, :35] = False
    places = (valid.cumsum(-1) - 1).clamp(min=0).to(torch.int32)
    keys, values = (torch.randn(2, H, 40, D, generator=rng) for _ in range(2))
    held = Indexed(Dense(), choice(8)).open(Spec(2, H, D, D, torch.float32, torch.device("cpu"), group=G))
    held.append(Chunk(keys, values, valid, {POSITION: places}))
    q = torch.randn(2, H, G, 1, D, generator=rng)
    few, all_read = held.attend_few(q, 0.3)[0], held.attend(q, 0.3)[0]
    assert torch.equal(few[1], all_read[1]) and not torch.allclose(few[0], all_read[0], atol=1e-3)


def test_it_goes_with_an_eviction():
    """As many tokens stay as without it, at every step, and other logits come of them."""
    model, prompt, said = subject("llama"), tokens(80), forced(1, 12)
    caches = [kvfold.Cache(model, text) for text in ("h2o(budget=40)", "h2o(budget=40) | kcache(budget=12, dense=0)")]
    plain, few = (follow(model, cache, *prompt.values(), said) for cache in caches)
    assert caches[0].kept_tokens == caches[1].kept_tokens
    assert_close(few[:, 0], plain[:, 0])
    assert not torch.allclose(few[:, 1:], plain[:, 1:], atol=1e-3)


def test_it_composes_with_codes():
    method = kvfold.parse("kvfold(budget=0.5) | kcache(budget=16, dense=0) | kivi(bits=4, group=8, residual=8)")
    cache = kvfold.Cache(subject("llama"), method)
    feed(subject("llama"), cache, *tokens(80).values())
    form = cache.paged[0].stored.segments[0][0]
    assert isinstance(form, Indexed) and isinstance(form.form, Kivi)
    assert torch.isfinite(feed(subject("llama"), cache, forced(1, 1), torch.ones(1, 81, dtype=torch.long))).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"budget": 0}, "budget=0"), ({"dense": -1}, "dense=-1"), ({"group": "mean"}, "group='mean'")],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        KCache(**options)
