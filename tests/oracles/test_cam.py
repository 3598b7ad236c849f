"""CaM against its card: what leaves spreads its value, with a probability, while decoding only."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvfold.methods.cam import SCORE, CaM
from kvfold.methods.full import Full
from kvfold.methods.h2o import H2O
from kvfold.methods.streamingllm import StreamingLLM
from kvfold.views import LayerView
from views import kept, random_view, run


def valued(values: list[float]) -> LayerView:
    view = random_view(T=len(values), D=1)
    v = torch.tensor(values, dtype=torch.float32)[None, None, :, None]
    return replace(view, tokens=replace(view.tokens, values=v))


def spread(method: CaM, values: list[float], got: list[float], leaving: tuple[int, ...] = (0,)) -> list[float]:
    """Values of what stays."""
    view = valued(values)
    stays = torch.tensor([[[i not in leaving for i in range(len(values))]]])
    after = view.apply(method.spread(view, stays, torch.tensor([[got]])))
    assert torch.equal(after.keys, view.keys)
    return after.values[0, 0, :, 0][stays[0, 0]].tolist()


def cam(**options: object) -> CaM:
    return CaM(**{"draw": "expected", **options})  # type: ignore[arg-type]


def test_oracle_1_values_spread_and_keys_stay():
    for draw in ("expected", "sampled"):
        assert spread(cam(targets=2, draw=draw), [10, 1, 2, 3], [1.0, 1, 1, 1]) == [6, 7, 3]
        assert spread(cam(targets=2, draw=draw), [10, 1, 2, 3], [0.0, 1, 1, 1]) == [1, 2, 3]


@pytest.mark.parametrize(("first", "targets", "chance"), [(0.3, 2, 1.0), (0.3, 3, 1.0), (0.06, 2, 0.2)])
def test_oracle_2_the_probability(first, targets, chance):
    left = spread(cam(targets=targets), [60, 0, 0, 0], [first, 0.2, 0.4, 0.1])
    assert left == pytest.approx([60 * chance / targets] * targets + [0.0] * (3 - targets))


def test_oracle_3_the_draw_is_unbiased():
    total = torch.zeros(3)
    for seed in range(250):
        total += torch.tensor(spread(cam(targets=2, draw="sampled", seed=seed), [8, 0, 0, 0], [0.12, 0.2, 0.4, 0.1]))
    assert_close(total / 250, torch.tensor([1.6, 1.6, 0.0]), atol=0.4, rtol=0)
    exact = torch.tensor(spread(cam(targets=2), [8, 0, 0, 0], [0.12, 0.2, 0.4, 0.1]))
    assert (torch.tensor([0.2, 0.4, 0.1]) * exact).sum().item() == pytest.approx(0.12 * 8)


def test_oracle_4_nothing_got_nothing_given():
    view = valued([10, 1, 2, 3])
    stays = torch.tensor([[[False, True, True, True]]])
    amend = cam(targets=2).spread(view, stays, torch.zeros(1, 1, 4))
    assert amend.slots.shape[-1] == 0


def test_oracle_4_a_large_budget_is_full_attention():
    view = random_view(B=2, H=2, G=2, T=20, left_pad=(0, 3))
    tensors = view.queries.states, view.keys, view.values, [14, *[1] * 6], view.queries.valid
    for method in (CaM(budget=20), CaM(budget=1.0)):
        for out, expected in zip(run(method, *tensors)[1], run(Full(), *tensors)[1], strict=True):
            assert torch.equal(out, expected)


def test_oracle_5_the_step_that_drops_answers_as_before():
    view = random_view(H=2, G=2, T=22, seed=4)
    tensors = view.queries.states, view.keys, view.values, [12, *[1] * 10]
    ours, base = (run(m, *tensors)[1] for m in (cam(budget=8), StreamingLLM(budget=8)))
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], base[:2], strict=True))  # the prompt, the first drop
    assert not torch.allclose(ours[2], base[2])
    assert kept(CaM(budget=8), view) == kept(StreamingLLM(budget=8), view)


def test_oracle_6_draws_do_not_depend_on_the_batch():
    view = random_view(B=3, H=2, T=24, seed=5)
    tensors = view.queries.states, view.keys, view.values
    both, outs = run(CaM(budget=6), *tensors, [10, *[1] * 14])
    for row in range(3):
        one = slice(row, row + 1)
        alone, out = run(CaM(budget=6), *(x[one] for x in tensors), [10, *[1] * 14])
        assert alone.kept()[0] == both.kept()[row]
        assert_close(torch.cat(out, 2)[0], torch.cat(outs, 2)[row], atol=1e-5, rtol=1e-4)
    again = run(CaM(budget=6), *tensors, [10, *[1] * 14])[1]
    other = run(CaM(budget=6, seed=1), *tensors, [10, *[1] * 14])[1]
    assert torch.equal(torch.cat(again, 2), torch.cat(outs, 2))
    assert not torch.equal(torch.cat(other, 2), torch.cat(outs, 2))


@pytest.mark.parametrize(("score", "group"), [("streamingllm(sinks=2)", 1), ("h2o", 2)])
def test_against_a_loop(score, group):
    """Token by token on lists, the base policy's choice read from the cache of a run without merging of keys."""
    prompt, total, budget, m = 9, 26, 7, 3
    view = random_view(H=1, G=group, T=total, D=8, seed=6)
    q, k, v = view.queries.states[0], view.keys[0, 0], view.values[0, 0].clone()
    method = cam(budget=budget, targets=m, score=score)
    steps = [prompt, *[1] * (total - prompt)]
    _, outs = run(method, view.queries.states, view.keys, view.values, steps)
    base = StreamingLLM(budget=budget, sinks=2) if score.startswith("stream") else H2O(budget=budget)
    held = run(base, view.queries.states, view.keys, view.values, [prompt])[0].kept()[0][0]  # keys never change
    got = dict.fromkeys(held, 0.0)
    for i in range(prompt, total):
        held = [*held, i]
        got[i] = 0.0
        weights = (q[:, i] @ k[held].T * 8**-0.5).softmax(-1)
        assert_close(outs[i - prompt + 1][0, :, 0], weights @ v[held], atol=1e-4, rtol=1e-3)
        for j, w in zip(held, weights.mean(0).tolist(), strict=True):
            got[j] += w
        after = run(base, view.queries.states, view.keys, view.values, [prompt, *[1] * (i - prompt + 1)])[0].kept()[0][
            0
        ]
        (gone,) = set(held) - set(after)
        targets = [j for j in after if j > gone][:m]
        if targets:
            chance = min(1.0, got[gone] / (sum(got[j] for j in targets) / len(targets)))
            for j in targets:
                v[j] += chance * v[gone] / len(targets)
        held = after


def test_what_was_given_goes_on_to_the_next():
    """The oldest of the window takes part of what leaves, and leaves next: information cascades."""
    values = spread(cam(targets=1), [10, 0, 0, 0], [1.0, 1, 1, 1])
    assert values == [10, 0, 0]
    assert spread(cam(targets=2), [*values], [1.0, 1, 1]) == [5, 5]


def test_several_leave_at_once():
    assert spread(cam(targets=2), [8, 4, 0, 0, 0], [1.0] * 5, (0, 1)) == [6, 6, 0]
    assert spread(cam(targets=2), [8, 0, 4, 0, 0], [1.0] * 5, (0, 2)) == [4, 6, 2]
    assert spread(cam(targets=2), [8, 0, 4], [1.0] * 3, (2,)) == [8, 0]  # nobody follows
    assert spread(cam(targets=3), [8, 0, 4], [1.0] * 3, (0,)) == [4, 8]


def test_attention_adds_up_while_decoding():
    view = random_view(H=2, G=2, T=20)
    cache, _ = run(CaM(budget=30), view.queries.states, view.keys, view.values, [12, *[1] * 8])
    column = cache.stored.tokens()[0].columns[SCORE]
    assert_close(column.sum(-1), torch.full((1, 2), 8.0))


@pytest.mark.parametrize("options", [{"targets": 0}, {"draw": "mean"}, {"seed": -1}, {"score": "d2o"}, {"budget": 0}])
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        CaM(**options)
