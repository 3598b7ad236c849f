"""EMS against its card: two scores, three classes, norms."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from kvfold.formats import LOG_MASS
from kvfold.methods.ems import EMS, GLOBAL, LOCAL
from kvfold.methods.full import Full
from kvfold.views import LayerView
from views import full_probabilities, kept, prompt_view, random_view, row_of, run, top


class Given(EMS):
    """The score of every token is what the view carries."""

    def measured(self, view: LayerView) -> tuple[Tensor, Tensor]:
        return view.place.module, view.place.module


def scored(scores: list[float], keys: list[list[float]], values: list[list[float]] | None = None) -> LayerView:
    k = torch.tensor([[keys]])
    v = k if values is None else torch.tensor([[values]])
    view = prompt_view(torch.zeros_like(k), k, v)
    return replace(view, place=replace(view.place, module=torch.tensor([[scores]], dtype=torch.float32)))


def after(method: EMS, view: LayerView) -> LayerView:
    for decision in method.after_prefill(view):
        view = view.apply(decision)
    return view


def test_oracle_1_both_scores_have_one_mean():
    view = random_view(T=4)
    g, local = torch.tensor([[[6.0, 1, 1, 0]]]), torch.tensor([[[0.0, 0, 1, 3]]])
    assert EMS().combined(view, g, local).tolist() == [[[6, 1, 2, 6]]]
    assert EMS(combine="sum").combined(view, g, local).tolist() == [[[6, 1, 3, 6]]]


PLAIN = {"window": 1, "share": 1.0}
CENTRES = [[1.0, 0], [0, 1.0]]


def test_oracle_2_what_fits_merges_and_what_does_not_leaves_no_trace():
    view = after(Given(budget=2, **PLAIN), scored([1, 4, 1], [[1.0, 0.1], *CENTRES]))
    assert view.valid.tolist() == [[[False, True, True]]]
    assert not torch.equal(view.keys[0, 0, 1], torch.tensor([1.0, 0])) and torch.equal(
        view.keys[0, 0, 2], torch.tensor([0, 1.0])
    )
    zero = after(Given(budget=2, **PLAIN), scored([1, 4, 1], [[-1.0, -1], *CENTRES]))
    assert torch.equal(zero.keys[0, 0, 1:], torch.tensor(CENTRES)) and not zero.amended


def test_oracle_3_two_negative_cosines_are_not_alike():
    view = after(Given(budget=2, **PLAIN), scored([1, 4, 1], [[-1.0, 0], *CENTRES], [[-1.0, 0], *CENTRES]))
    assert torch.equal(view.keys[0, 0, 1:], torch.tensor(CENTRES)) and not view.amended


@pytest.mark.parametrize("options", [{"many": 0.0}, {"similar": 1.5}, {"share": 0.0}])
def test_oracle_4_no_merging_is_eviction(options):
    view = random_view(B=2, H=2, G=2, T=40, D=4, left_pad=(0, 7))
    merging = after(EMS(budget=12, window=4, similar=0.2, share=1.0), view)
    bare = after(EMS(**{"budget": 12, "window": 4, "similar": 0.2, "share": 1.0, **options}), view)
    assert torch.equal(bare.keys, view.keys) and torch.equal(bare.values, view.values)
    assert torch.equal(bare.valid, merging.valid) and not torch.equal(merging.keys, view.keys)


def test_oracle_5_norms_are_kept():
    view = after(Given(budget=2, **PLAIN), scored([2, 2, 1], [[0.0, 4], [0, 2], [1, 0]]))
    assert_close(view.keys[0, 0, 0], torch.tensor([0.0, 3.0]))
    askew = after(Given(budget=2, similar=0.4, **PLAIN), scored([2, 2, 1], [[2.0, 0], [1, 1], [0, -1]]))
    assert askew.keys[0, 0, 0].norm().item() == pytest.approx((2 + 2**0.5) / 2)


@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 30), st.integers(0, 5))
def test_oracle_6_every_head_keeps_its_budget(length, pad, budget, seed):
    view = random_view(B=2, H=2, G=2, T=length + pad, left_pad=(pad, 0), seed=seed)
    assert torch.equal(after(EMS(budget=budget, window=4), view).count, view.count.clamp(max=budget))


def test_how_many_are_worth_merging():
    method = EMS(share=0.9, many=1.0)
    view = random_view(T=6)
    scores = torch.tensor([[[40.0, 5, 30, 10, 10, 5]]])
    held = torch.tensor([[[True, False, True, False, False, False]]])
    two, one = torch.tensor([[2]]), torch.tensor([[1]])
    assert method.middling(view, scores, held, two).tolist() == [[[False, False, False, True, True, False]]]
    held[..., 2] = False
    assert method.middling(view, scores, held, one).tolist() == [[[False, False, True, False, False, False]]]


def slow(view: LayerView, row: int, method: EMS) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """The card's steps 1 to 4 for one row without padding: keys and values of the centres, by head."""
    alone, probs = row_of(view, row), full_probabilities(view, row)
    total, heads = probs.shape[-1], []
    for head in range(view.heads):
        group = len(probs) // view.heads
        mine = probs[head * group : (head + 1) * group]
        g, local = mine.sum((0, 1)), mine[:, -method.window :].sum((0, 1))
        s = torch.maximum(g, local * g.mean() / local.mean())
        window = set(range(total - method.window, total))
        centres = top([float("inf") if i in window else float(x) for i, x in enumerate(s)], method.budget)
        rest = sorted(set(range(total)) - set(centres), key=lambda i: (-float(s[i]), i))
        so_far, members = float(s[centres].sum()), {c: [c] for c in centres}
        for i in rest[: int(method.many * method.budget)]:
            if so_far >= method.share * float(s.sum()):
                break
            so_far += float(s[i])
            k, v = alone.keys[0, head], alone.values[0, head]
            alike = [
                max(0.0, F.cosine_similarity(k[i], k[c], dim=0).item())
                * max(0.0, F.cosine_similarity(v[i], v[c], dim=0).item())
                for c in centres
            ]
            if max(alike) > method.similar:
                members[centres[alike.index(max(alike))]].append(i)
        found = {}
        for c, group_of in members.items():
            k, v = alone.keys[0, head, group_of], alone.values[0, head, group_of]
            a = (s[group_of] / s[group_of].sum())[:, None]
            direction = F.normalize((a * F.normalize(k, dim=-1)).sum(0), dim=0)
            found[c] = (direction * (a * k.norm(dim=-1, keepdim=True)).sum(), (a * v).sum(0))
        heads.append(found)
    return heads


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_against_a_loop(share):
    view = random_view(B=2, H=2, G=2, T=44, D=4, left_pad=(0, 6), seed=3)
    method = EMS(budget=11, window=4, similar=0.3, share=share, many=2.0)
    got = after(method, view)
    for row in range(2):
        for head, centres in enumerate(slow(view, row, method)):
            here = got.valid[row, head]
            assert got.positions[row, head][here].tolist() == sorted(centres)
            for slot in here.nonzero()[:, 0].tolist():
                key, value = centres[int(got.positions[row, head, slot])]
                assert_close(got.keys[row, head, slot], key, atol=1e-5, rtol=1e-4)
                assert_close(got.values[row, head, slot], value, atol=1e-5, rtol=1e-4)


def test_scores_add_up_over_a_set_and_over_steps():
    view = after(Given(budget=2, **PLAIN), scored([1, 4, 1], [[1.0, 0.1], *CENTRES]))
    assert view.columns[GLOBAL][0, 0, 1:].tolist() == [5, 1]
    view = random_view(H=2, T=30, seed=1)
    cache, _ = run(EMS(budget=8, window=4), view.queries.states, view.keys, view.values, [12, *[1] * 18])
    assert (cache.counts() == 8).all()
    tokens = cache.stored.tokens()[0]
    of_all, of_last = (tokens.columns[name].masked_fill(~tokens.valid, 0.0).sum(-1) for name in (GLOBAL, LOCAL))
    assert (of_all <= 30).all() and (of_last <= 4.001).all()
    assert all(head[-4:] == [26, 27, 28, 29] for head in cache.kept()[0])


def test_equal_tokens_are_merged_without_loss_when_they_are_counted():
    rng = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 5, 16, generator=rng)[:, :, torch.arange(32) % 5]
    q = torch.randn(1, 2, 32, 16, generator=rng)
    method = EMS(budget=10, window=5, similar=0.99, share=1.0, mass="counted")
    chunks = [20, *[1] * 12]
    cache, outs = run(method, q, k, k, chunks)
    tokens = cache.stored.tokens()[0]
    assert_close(tokens.columns[LOG_MASS].exp()[tokens.valid].sum(), torch.tensor(32.0))
    for out, expected in zip(outs, run(Full(), q, k, k, chunks)[1], strict=True):
        assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_row_alone_and_frames():
    view = random_view(B=2, H=2, G=2, T=30, D=4, left_pad=(0, 9))
    both = kept(EMS(budget=0.4, window=4), view)
    for row in range(2):
        assert kept(EMS(budget=0.4, window=4), row_of(view, row))[0] == both[row]
    with pytest.raises(ValueError, match="frame='unrotated'"):
        EMS(frame="unrotated").after_prefill(view)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0}, {"window": 0}, {"similar": -0.1}, {"share": 1.5}, {"many": -1.0}, {"combine": "mean"},
        {"mass": "paper"}, {"frame": "x"},
    ],
)  # fmt: skip
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        EMS(**options)
