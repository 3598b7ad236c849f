"""KVMerger against its card: the eight points of its oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.formats import LOG_MASS
from kvfold.merges import chain_links, fold_sets, sets_of
from kvfold.methods.full import Full
from kvfold.methods.kvmerger import KVMerger
from kvfold.views import LayerView
from views import prompt_view, random_view, run

PLAIN = {"recent": 0.0, "heavy": 0.0, "skip": ()}


def groups(cosine: list[float], protected: tuple[int, ...] = (), count: int = 0, threshold: float | None = None):
    """The sets, as lists of slots, for tokens with these cosines of neighbours."""
    total = len(cosine) + 1
    free = torch.tensor([[[i not in protected for i in range(total)]]])
    link = chain_links(torch.tensor([[[*cosine, -torch.inf]]]), free, torch.tensor([[count]]), threshold)
    sets = sets_of(link)[0, 0].tolist()
    return [[i for i in range(total) if sets[i] == name] for name in sorted(set(sets))]


def merged(method: KVMerger, view: LayerView) -> LayerView:
    decision = method.after_prefill(view)
    return view if decision is None else view.apply(decision)


def slots(view: LayerView, row: int = 0, head: int = 0) -> tuple[list[int], Tensor, Tensor, list[float]]:
    """Positions, keys, values and token counts of the slots of one head."""
    here = view.valid[row, head]
    mass = view.columns[LOG_MASS].exp() if LOG_MASS in view.columns else torch.ones(view.valid.shape)
    return (
        view.positions[row, head][here].tolist(), view.keys[row, head][here], view.values[row, head][here],
        mass[row, head][here].tolist(),
    )  # fmt: skip


def read(q: Tensor, view: LayerView, scale: float) -> Tensor:
    """What later queries (H, Q, D) of row 0 get, head by head, with the log of the counts as the bias."""
    outs = []
    for head in range(view.heads):
        _, keys, values, mass = slots(view, 0, head)
        bias = torch.tensor(mass).log()[None, None, None]
        outs.append(ops.attend(q[None, head : head + 1], keys[None, None], values[None, None], scale, bias)[0][0, 0])
    return torch.stack(outs)


def test_oracle_1_scan():
    cosine = [0.9, 0.2, 0.8, 0.95, 0.1]
    assert groups(cosine, threshold=0.75) == [[0, 1], [2, 3, 4], [5]]
    assert groups(cosine, count=2) == [[0, 1], [2], [3, 4], [5]]
    assert groups(cosine, count=0) == [[i] for i in range(6)]
    assert groups(cosine, count=4, threshold=0.75) == [[0, 1, 2, 3, 4], [5]]  # the budget asks for more
    assert groups([0.5, 0.5, 0.5], count=1) == [[0, 1], [2], [3]]  # ties to the earlier pair


def test_oracle_1_a_budget_with_room_changes_nothing():
    view = random_view(H=2, G=2, T=12)
    for budget in (12, 13, 1.0):
        assert KVMerger(budget=budget, skip=()).after_prefill(view) is None


def test_oracle_2_similarity_chains():
    angles = torch.tensor([0.0, 30, 60, 90]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], -1)[None, None]
    view = merged(KVMerger(budget=4, threshold=0.75, **PLAIN), prompt_view(torch.zeros_like(keys), keys, keys))
    assert slots(view)[0] == [0] and slots(view)[3] == [pytest.approx(4.0)]


def test_oracle_3_protected_tokens_cut_runs():
    assert groups([0.99] * 4, protected=(2,), threshold=0.75) == [[0, 1], [2], [3, 4]]
    assert groups([0.99] * 4, protected=(2,), count=4) == [[0, 1], [2], [3, 4]]


def pair(sigma: str | float) -> tuple[Tensor, Tensor]:
    """Weights and merged key of k_0 = (1, 0), k_1 = (1, 0.1) with the second one more important."""
    keys = torch.tensor([[[[1.0, 0.0], [1.0, 0.1]]]])
    sets, importance = torch.zeros(1, 1, 2, dtype=torch.int64), torch.tensor([[[1.0, 2.0]]])
    folded = fold_sets(keys, keys, sets, importance, torch.ones(1, 1, 2), bandwidth=sigma)
    assert folded.pivot.tolist() == [[[False, True]]]
    return folded.weight[0, 0], folded.keys[0, 0, 1]


def test_oracle_4_weights():
    weight, key = pair(1.0)
    assert_close(weight, torch.tensor([0.498750, 0.501250]), atol=1e-6, rtol=0)
    assert weight[0] / weight[1] == pytest.approx(0.995012, abs=1e-6)
    assert_close(key, torch.tensor([1.0, 0.0501250]), atol=1e-6, rtol=0)


def test_oracle_4_mean_distance_is_dominated_by_the_pivot():
    weight, _ = pair("mean_distance")
    assert weight[1] == pytest.approx(0.982014, abs=1e-6)
    assert weight[0] / weight[1] == pytest.approx(math.exp(-4), abs=1e-6)
    assert_close(pair(0.1 / 2 / 2**0.5)[0], weight, atol=1e-6, rtol=1e-5)  # sigma = .0353553


def test_members_weigh_as_many_tokens_as_they_stand_for():
    """Slots of three, two (the pivot) and one token, the outer ones equally near."""
    keys = torch.tensor([[[[0.0, 1.0], [0.0, 0.0], [0.0, -1.0]]]])
    mass = torch.tensor([[[3.0, 2.0, 1.0]]])
    sets, importance = torch.zeros(1, 1, 3, dtype=torch.int64), torch.tensor([[[0.0, 1.0, 0.0]]])
    folded = fold_sets(keys, keys, sets, importance, mass, bandwidth=1.0)
    g = math.exp(-1 / 2)
    assert_close(folded.weight[0, 0], torch.tensor([3 * g, 2.0, g]) / (4 * g + 2))
    assert folded.size[0, 0].tolist() == [6.0] * 3


@pytest.mark.parametrize(("mass", "expected"), [("convex", 1 / 2), ("paper", 1.0), ("counted", 2 / 3)])
def test_oracle_5_mass(mass, expected):
    """Three tokens with equal logits, v = 1, 1, 0, the first two merged; the full answer is 2/3."""
    keys = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]])
    values = torch.tensor([[[[1.0], [1.0], [0.0]]]])
    view = prompt_view(torch.zeros_like(keys), keys, values)
    assert ops.attend(torch.zeros(1, 1, 1, 2), keys, values, 1.0)[0].item() == pytest.approx(2 / 3)
    view = merged(KVMerger(budget=2, mass=mass, **PLAIN), view)
    assert slots(view)[0] == [0, 2]
    assert read(torch.zeros(1, 1, 2), view, 1.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mass", ["convex", "paper", "counted"])
def test_oracle_5_mass_in_a_cache(mass):
    """The same through pages: the column is there at the next token and at every later one."""
    keys = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]]])
    values = torch.tensor([[[[1.0], [1.0], [0.0], [0.0], [0.0]]]])
    _, outs = run(KVMerger(budget=2, mass=mass, **PLAIN), torch.zeros_like(keys), keys, values, [3, 1, 1])
    got = [out.item() for out in outs[1:]]
    expected = {"convex": [1 / 3, 1 / 4], "paper": [2 / 3, 2 / 4], "counted": [2 / 4, 2 / 5]}[mass]
    assert got == pytest.approx(expected, abs=1e-6)


def runs_of_equal_tokens(lengths: list[int], seed: int) -> tuple[LayerView, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, 2, len(lengths), 8, generator=rng) for _ in range(2))
    many = torch.tensor(lengths)
    k, v = (x.repeat_interleave(many, 2) for x in (k, v))
    q = torch.randn(1, 4, k.shape[2], 8, generator=rng)
    return prompt_view(q, k, v), torch.randn(2, 5, 8, generator=rng)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 99))
def test_oracle_6_equal_keys_and_values_are_exact(lengths, seed):
    view, later = runs_of_equal_tokens(lengths, seed)
    expected = ops.attend(later[None], view.keys, view.values, 0.35)[0][0]
    counted = merged(KVMerger(budget=len(lengths), **PLAIN), view)
    assert slots(counted)[3] == pytest.approx(lengths)
    assert_close(read(later, counted, 0.35), expected, atol=1e-5, rtol=1e-4)


def test_oracle_6_convex_is_not_exact():
    view, later = runs_of_equal_tokens([1, 5, 1, 2], seed=0)
    expected = ops.attend(later[None], view.keys, view.values, 0.35)[0][0]
    convex = merged(KVMerger(budget=4, mass="convex", **PLAIN), view)
    assert (read(later, convex, 0.35) - expected).norm() / expected.norm() > 0.05


def random_sets(total: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 3, total, 8, generator=rng) * 2 for _ in range(2))
    sets = sets_of(torch.rand(2, 3, total, generator=rng) < 0.6)
    return keys, values, sets, torch.rand(2, 3, total, generator=rng)


@given(st.integers(1, 40), st.integers(0, 99), st.sampled_from(["mean_distance", "literal", 5.0, 0.2]))
def test_oracle_7_sums(total, seed, bandwidth):
    keys, values, sets, importance = random_sets(total, seed)
    folded = fold_sets(keys, values, sets, importance, torch.ones_like(importance), bandwidth=bandwidth)
    of_set = torch.zeros(2, 3, total).scatter_add(-1, sets, folded.weight)
    assert_close(of_set[of_set > 0], torch.ones_like(of_set[of_set > 0]))
    assert torch.equal((folded.size * folded.pivot).sum(-1), torch.full((2, 3), float(total)))
    assert torch.equal(folded.pivot.sum(-1), sets.amax(-1) + 1)
    alone = folded.size == 1
    assert torch.equal(folded.keys[alone], keys[alone]) and torch.equal(folded.values[alone], values[alone])


@given(st.integers(2, 40), st.integers(0, 99))
def test_oracle_7_the_literal_sigma_is_at_most_a_root_of_half(total, seed):
    """g = exp(-d^2 / 2 sigma^2) with sigma <= 2 ** -0.5 means g <= exp(-d^2) for every member, near or far."""
    keys, values, sets, importance = random_sets(total, seed)
    keys = keys * 0.1  # near, so that the fixed point is not just the pivot
    folded = fold_sets(keys, values, sets, importance, torch.ones_like(importance), bandwidth="literal")
    for row, head, slot in (~folded.pivot).nonzero().tolist():
        mates = (sets[row, head] == sets[row, head, slot]).nonzero()[:, 0]
        pivot = next(i for i in mates.tolist() if folded.pivot[row, head, i])
        g = folded.weight[row, head, mates] / folded.weight[row, head, pivot]
        distance = (keys[row, head, mates] - keys[row, head, pivot]).norm(dim=-1)
        assert (g <= torch.exp(-(distance**2)) + 1e-6).all()
        sigma = g.mean() / 2**0.5  # it is the fixed point of the printed formula
        assert_close(g, torch.exp(-(distance**2) / (2 * sigma**2)), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mass", ["counted", "paper", "convex"])
def test_oracle_7_protected_slots_are_bit_identical(dtype, mass):
    view = random_view(B=2, H=2, G=3, T=60, D=16, left_pad=(0, 13), seed=2, dtype=dtype)
    method = KVMerger(budget=0.4, mass=mass, recent=0.1, heavy=0.1, skip=())
    budget = view.budget(method.budget)
    safe = method.protected(view, view.column_sums(), budget)
    after = merged(method, view)
    assert safe.any(-1).all() and (after.valid | ~safe).all()
    assert torch.equal(after.keys[safe], view.keys[safe]) and torch.equal(after.values[safe], view.values[safe])
    for row, tokens in enumerate((60, 47)):
        recent = int(0.1 * tokens)
        assert (safe[row].sum(-1) == recent + int(0.1 * tokens)).all() and safe[row, :, 60 - recent :].all()


@pytest.mark.parametrize("factor", [0.01, 7.0, 1000.0])
def test_oracle_8_scaling_all_keys_changes_neither_sets_nor_weights(factor):
    view = random_view(B=2, H=2, G=2, T=50, D=16, left_pad=(0, 8), seed=3)
    scaled = prompt_view(view.queries.states / factor, view.keys * factor, view.values, view.queries.valid)
    method = KVMerger(budget=0.3, skip=())
    one, other = merged(method, view), merged(method, scaled)
    assert torch.equal(one.valid, other.valid)
    assert_close(one.columns[LOG_MASS], other.columns[LOG_MASS])
    assert_close(one.keys[one.valid] * factor, other.keys[one.valid], atol=1e-4 * factor, rtol=1e-4)
    assert_close(one.values[one.valid], other.values[one.valid], atol=1e-4, rtol=1e-4)


def test_merging_is_nearer_to_full_attention_with_its_mass():
    """What the card measured: for similar neighbours counted beats convex."""
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 30, 16, generator=rng).repeat_interleave(4, 2) for _ in range(2))
    k, v = k + 0.2 * torch.randn(k.shape, generator=rng), v + 0.2 * torch.randn(v.shape, generator=rng)
    q, later = torch.randn(1, 4, 120, 16, generator=rng), torch.randn(2, 20, 16, generator=rng)
    full = ops.attend(later[None], k, v, 0.25)[0][0]
    error = {
        mass: (read(later, merged(KVMerger(budget=0.35, mass=mass, skip=()), prompt_view(q, k, v)), 0.25) - full).norm()
        for mass in ("counted", "convex")
    }
    assert error["counted"] < error["convex"] / 2


def test_budget_one_is_full_attention():
    view = random_view(B=2, H=2, G=2, T=20, left_pad=(0, 4))
    tensors = view.queries.states, view.keys, view.values, [15, *[1] * 5], view.queries.valid
    for out, expected in zip(run(KVMerger(budget=1.0), *tensors)[1], run(Full(), *tensors)[1], strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "options",
    [{"budget": 0}, {"mass": "voted"}, {"threshold": 1.1}, {"recent": -0.1}, {"heavy": 2.0}, {"bandwidth": "wide"},
     {"bandwidth": 0.0}, {"skip": (0.5,)}],
)  # fmt: skip
def test_bad_options(options):
    (name,) = options
    with pytest.raises((ValueError, TypeCheckError), match=name):
        KVMerger(**options)
