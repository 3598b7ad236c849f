"""Chelsea against its card: matching within chunks, centroids of all members, counts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from kvfold.formats import LOG_MASS
from kvfold.methods.chelsea import Chelsea
from kvfold.methods.full import Full
from kvfold.views import LayerView
from views import kept, prompt_view, random_view, row_of, run

BARE = {"sinks": 0, "window": 0}


def angled(*degrees: float, values: Tensor | None = None) -> LayerView:
    angles = torch.tensor(degrees).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], -1)[None, None]
    return prompt_view(torch.zeros_like(keys), keys, keys if values is None else values[None, None])


def clustered(method: Chelsea, view: LayerView, need: int) -> LayerView:
    for decision in method.clustered(view, view.valid, torch.full(view.valid.shape[:2], need)):
        view = view.apply(decision)
    return view


def left(view: LayerView) -> tuple[list[int], list[float]]:
    """Slots of the first head that are left, and how many tokens each stands for."""
    here = view.valid[0, 0]
    mass = view.columns[LOG_MASS][0, 0].exp() if LOG_MASS in view.columns else torch.ones(len(here))
    return here.nonzero()[:, 0].tolist(), mass[here].tolist()


def test_oracle_1_one_chunk():
    view = angled(0, 2, 90, 91)
    assert left(clustered(Chelsea(chunk=4), view, 1)) == ([0, 1, 3], pytest.approx([1, 1, 2]))
    two = clustered(Chelsea(chunk=4), view, 2)
    assert left(two) == ([1, 3], pytest.approx([2, 2]))
    assert_close(two.keys[0, 0, 1], view.keys[0, 0, :2].mean(0))


def test_oracle_2_two_that_join_the_same():
    values = torch.tensor([[3.0], [0.0], [6.0], [50.0]])
    after = clustered(Chelsea(chunk=4), angled(0, 2, 5, 91, values=values), 2)
    assert left(after) == ([1, 3], pytest.approx([3, 1]))
    assert after.values[0, 0, 1].item() == pytest.approx(3.0)  # not ((3 + 0) / 2 + 6) / 2
    assert torch.equal(after.values[0, 0, 3], values[3])


def test_oracle_3_tokens_weigh_as_many_as_they_stand_for():
    values = torch.tensor([[1.0], [4.0]])
    view = angled(0, 2, values=values)
    column = torch.tensor([[[2.0, 1.0]]]).log()
    view = replace(view, tokens=view.tokens.but(view.valid, {**view.columns, LOG_MASS: column}))
    after = clustered(Chelsea(chunk=2), view, 1)
    assert after.values[0, 0, 1].item() == pytest.approx(2.0) and left(after) == ([1], pytest.approx([3]))


@given(st.integers(2, 60), st.integers(0, 9), st.integers(2, 9), st.integers(1, 30), st.integers(0, 5))
def test_oracle_4_counts_and_budgets_are_exact(length, pad, chunk, budget, seed):
    view = random_view(B=2, H=2, T=length + pad, left_pad=(pad, 0), seed=seed)
    method = Chelsea(budget=budget, chunk=chunk)
    decisions = method.after_prefill(view)
    assert (decisions is None) == (length + pad <= budget)
    after = view
    for decision in decisions or ():
        after = after.apply(decision)
    if decisions:
        mass = after.columns[LOG_MASS].exp().masked_fill(~after.valid, 0.0).sum(-1)
        assert_close(mass, view.count.float(), atol=1e-3, rtol=0)
    assert torch.equal(after.count, view.count.clamp(max=budget))


@pytest.mark.parametrize("mass", ["counted", "convex"])
def test_oracle_5_equal_pairs_are_exact_where_they_count(mass):
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 20, 8, generator=rng).repeat_interleave(2, 2) for _ in range(2))
    k, v = (torch.cat([x, torch.randn(1, 2, 5, 8, generator=rng)], 2) for x in (k, v))
    q = torch.randn(1, 4, 45, 8, generator=rng)
    _, outs = run(Chelsea(budget=20, mass=mass, **BARE), q, k, v, [40, 1, 1, 3])
    gaps = [
        float((out - full).abs().max()) for out, full in zip(outs, run(Full(), q, k, v, [40, 1, 1, 3])[1], strict=True)
    ]
    assert max(gaps) < 1e-5 if mass == "counted" else min(gaps[1:]) > 1e-3 > gaps[0]


def test_oracle_5_convex_loses_mass():
    """Logits equal, values 1, 1, 0: 2/3 where tokens are counted, 1/2 where not."""
    k = torch.tensor([[[[1.0, 0], [1, 0], [0, 1], [0, 0], [0, 0]]]])
    v = torch.tensor([[[[1.0], [1], [0], [0], [0]]]])
    for mass, expected in (("counted", 2 / 4), ("convex", 1 / 3)):
        method = Chelsea(budget=2, mass=mass, **BARE)
        assert run(method, torch.zeros_like(k), k, v, [3, 1])[1][1].item() == pytest.approx(expected)


def test_oracle_6_chunks_are_apart():
    after = clustered(Chelsea(chunk=2), angled(0, 40, 40, 100), 1)
    assert left(after) == ([1, 2, 3], pytest.approx([2, 1, 1]))


def test_oracle_7_nothing_to_do():
    view = random_view(B=2, T=20, left_pad=(0, 3))
    assert Chelsea(budget=20).after_prefill(view) is None and Chelsea(budget=1.0).after_prefill(view) is None


def test_sinks_and_the_end_are_left_alone():
    view = random_view(H=2, T=80)
    after = view
    for decision in Chelsea(budget=32, sinks=3, window=6).after_prefill(view):
        after = after.apply(decision)
    for slot in (0, 1, 2, *range(74, 80)):
        assert after.valid[0, :, slot].all()
        assert torch.equal(after.keys[0, :, slot], view.keys[0, :, slot])
        assert (after.columns[LOG_MASS][0, :, slot] == 0).all()


def slow(
    keys: Tensor, values: Tensor, free: list[int], need: int, chunk: int, counts: list[int] | None = None
) -> dict[int, tuple[Tensor, Tensor, int]]:
    """The card's rounds for one head: what stands in each slot in the end, and how many tokens it is."""
    state = {i: (keys[i], values[i], counts[i] if counts else 1) for i in range(len(keys))}
    while need:
        found = []
        for start in range(0, len(free), chunk):
            here = free[start : start + chunk]
            for a in here[::2]:
                if here[1::2]:
                    cosines = [torch.cosine_similarity(state[a][0], state[b][0], dim=0).item() for b in here[1::2]]
                    found.append((max(cosines), a, here[1::2][cosines.index(max(cosines))]))
        for _, a, b in sorted(found, key=lambda one: (-one[0], one[1]))[:need]:
            one, two = state.pop(a), state[b]
            n = one[2] + two[2]
            key, value = ((x * one[2] + y * two[2]) / n for x, y in zip(one[:2], two[:2], strict=True))
            state[b] = key, value, n
            free.remove(a)
            need -= 1
    return state


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize(("budget", "chunk"), [(30, 8), (12, 8), (12, 5), (7, 64), (9, 2)])
def test_against_a_loop(budget, chunk, turn):
    """On a second turn tokens stand for 1 to 9: centroids of a round are matched by the mean of all that they hold."""
    view = random_view(B=2, H=2, T=48, left_pad=(0, 7), seed=budget)
    counts = torch.randint(1, 10, (2, 2, 48)) if turn == 2 else torch.ones(2, 2, 48, dtype=torch.long)
    view = replace(view, tokens=view.tokens.but(view.valid, {**view.columns, LOG_MASS: counts.float().log()}))
    method = Chelsea(budget=budget, chunk=chunk, sinks=2, window=3)
    after = view
    for decision in method.after_prefill(view):
        after = after.apply(decision)
    for row in range(2):
        alone = row_of(view, row)
        total = alone.keys.shape[2]
        sinks, window = min(2, budget // 4), max(1, min(3, budget // 4))
        for head in range(2):
            free = list(range(sinks, total - window))
            own = counts[row, head, -total:].tolist()
            state = slow(alone.keys[0, head], alone.values[0, head], free, total - budget, chunk, own)
            here = after.valid[row, head]
            assert after.positions[row, head][here].tolist() == sorted(state)
            for slot in here.nonzero()[:, 0].tolist():
                key, value, count = state[int(after.positions[row, head, slot])]
                assert_close(after.keys[row, head, slot], key, atol=1e-5, rtol=1e-5)
                assert_close(after.values[row, head, slot], value, atol=1e-5, rtol=1e-5)
                assert after.columns[LOG_MASS][row, head, slot].exp().item() == pytest.approx(count, rel=1e-5)


def test_online_each_chunk_of_generated_tokens_shrinks():
    view = random_view(B=2, H=2, T=40, seed=1)
    tensors = view.queries.states, view.keys, view.values, [20, *[1] * 20]
    off, _ = run(Chelsea(budget=0.5, chunk=8), *tensors)
    on, _ = run(Chelsea(budget=0.5, chunk=8, online=True), *tensors)
    assert (off.counts() == 10 + 20).all() and (on.counts() == 10 + 4 + 4 + 4).all()
    assert Chelsea(online=True).listens("after_decode") and not Chelsea().listens("after_decode")
    tokens = on.stored.tokens()[0]
    mass = tokens.columns[LOG_MASS].exp().masked_fill(~tokens.valid, 0.0)  # there may be holes
    assert_close(mass.sum(-1), torch.full((2, 2), 40.0))
    assert [p for p in on.kept()[0][0] if p >= 36] == [36, 37, 38, 39]


def test_compared_without_rotation_where_asked():
    class Still:
        def shift(self, x, steps):
            return torch.roll(x, 1, -1) if bool((steps < 0).any()) else torch.roll(x, -1, -1)

    view = random_view(H=2, T=40, rope=Still())
    rotated, turned = Chelsea(budget=20), Chelsea(budget=20, frame="unrotated")
    assert kept(rotated, view) == kept(turned, view)
    with pytest.raises(ValueError, match="frame='unrotated'"):
        turned.after_prefill(random_view(T=40))


@pytest.mark.parametrize(
    "options",
    [{"budget": 0}, {"chunk": 1}, {"sinks": -1}, {"window": -1}, {"mass": "paper"}, {"frame": "x"}, {"online": 3}],
)
def test_bad_options(options, unchecked):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Chelsea(**options)
