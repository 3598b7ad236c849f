"""LOOK-M against its card: text first, three ways to merge, and nothing without an image."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold.formats import LOG_MASS
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.merges import absorb
from kvfold.methods.full import Full
from kvfold.methods.look_m import SCORE, LookM, text_first
from kvfold.views import IMAGE, Images, LayerView
from kvfold.views.decisions import Keep
from views import full_probabilities, prompt_view, random_view, row_of, top


def seen(*rows: str) -> Images:
    """A row is written as its tokens from the first on, "i" for a part of an image."""
    width = max(map(len, rows))
    flags = [[character == "i" for character in row.ljust(width)] for row in rows]
    return Images(torch.zeros(len(rows), dtype=torch.int64), torch.tensor(flags))


def after(method: LookM, view: LayerView) -> LayerView:
    for decision in method.after_prefill(view) or ():
        view = view.apply(decision)
    return view


def held(method: LookM, view: LayerView) -> list[list[list[int]]]:
    view = after(method, view)
    return [[view.positions[b, h][view.valid[b, h]].tolist() for h in range(view.heads)] for b in range(len(view.keys))]


@pytest.mark.parametrize(
    ("merge", "gone", "expected"),
    [("pivot", [4.0], 1), ("average", [4.0], 2), ("pivot", [4.0, 8.0], 2), ("average", [4.0, 8.0], 4)],
)
def test_oracle_1_weights_of_a_set(merge, gone, expected):
    k = torch.tensor([0.0, *gone])[None, None, :, None]
    view = prompt_view(torch.zeros_like(k), k, 2 * k)
    home, weight = LookM(merge=merge).weighed(torch.zeros(view.valid.shape, dtype=torch.int64), torch.ones(k.shape[:3]))
    merged = view.apply(absorb(view, home, weight))
    assert merged.keys[0, 0, 0].item() == expected and merged.values[0, 0, 0].item() == 2 * expected


def test_weighted_takes_what_is_more_alike_than_most():
    k = torch.tensor([2.0, 4, 8, 16])[None, None, :, None]
    view = prompt_view(torch.zeros_like(k), k, k)
    cosine = torch.tensor([[[-torch.inf, 0.5, 1.0, 0.3]]])  # their mean is 0.6
    home, weight = LookM(merge="weighted").weighed(torch.zeros(view.valid.shape, dtype=torch.int64), cosine)
    assert home.tolist() == [[[0, 1, 0, 3]]]
    assert view.apply(absorb(view, home, weight)).keys[0, 0, 0].item() == (2 + 1.0 * 8) / 2


def test_oracle_2_all_text_stays_and_images_fill_up():
    view = random_view(T=10, images=seen("ttiiiiittt"))
    (one,) = held(LookM(budget=6, recent=0.34), view)[0]
    assert {0, 1, 7, 8, 9} < set(one) and len(one) == 6
    assert held(LookM(budget=4), view)[0][0][-2:] == [8, 9]
    (text,) = held(LookM(budget=4), view)[0]
    assert len(text) == 4 and set(text) < {0, 1, 7, 8, 9}  # capped
    assert held(LookM(budget=4, overrun=True), view) == [[[0, 1, 7, 8, 9]]]  # as in the paper


@pytest.mark.parametrize("images", [None, seen("t" * 12)])
def test_oracle_3_without_an_image_nothing_happens(images):
    view = random_view(H=2, G=2, T=12, images=images)
    assert LookM(budget=0.2).after_prefill(view) is None


def test_rows_without_an_image_stay_as_they_are():
    view = random_view(B=2, H=2, G=2, T=12, left_pad=(0, 3), images=seen("ttiiiiiitttt", "ttttttttt"))
    left = after(LookM(budget=0.5), view)
    assert left.count.tolist() == [[6, 6], [9, 9]]
    assert torch.equal(left.keys[1], view.keys[1]) and not torch.equal(left.keys[0], view.keys[0])


@pytest.mark.parametrize(("mass", "exact"), [("counted", True), ("convex", False)])
@pytest.mark.parametrize("merge", ["pivot", "average", "weighted"])
def test_oracle_4_and_5_equal_tokens_and_what_comes_after(mass, exact, merge):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 15, 16, generator=rng) for heads in (4, 2, 2))
    for states in (k, v):
        states[:, :, 2:8] = states[:, :, 2:3]
    method = LookM(budget=6, recent=0.34, merge=merge, mass=mass)
    layers = [KVLayer(Rows(method), 0), KVLayer(Rows(Full()), 0)]
    shown = Plan(prefill=True, images=seen("ttiiiiiittt"))
    for layer in layers:
        layer.attend(q[:, :, :11], k[:, :, :11], v[:, :, :11], None, 0.25, shown)
    tokens = layers[0].stored.tokens()[0]
    for states, full in ((tokens.keys, k), (tokens.values, v)):
        for h in range(2):
            kept = tokens.positions[0, h][tokens.valid[0, h]].long()
            assert_close(states[0, h][tokens.valid[0, h]], full[0, h, kept])
    if mass == "counted":
        assert_close(tokens.columns[LOG_MASS].exp()[tokens.valid].sum(), torch.tensor(22.0))
    for step in range(11, 15):
        here = slice(step, step + 1)
        mine, theirs = (
            x.attend(q[:, :, here], k[:, :, here], v[:, :, here], None, 0.25, Plan(prefill=False)) for x in layers
        )
        assert torch.allclose(mine, theirs, atol=1e-5) == exact
        assert (layers[0].counts() == 6 + step - 10).all()


def test_text_comes_first_whatever_the_scores():
    view = random_view(T=6, left_pad=(1,))
    scores = torch.tensor([[[9e9, 1e-30, 1e30, 3.0, 0.0, 2.0]]])
    text = torch.tensor([[[False, True, False, False, True, False]]])
    order = text_first(view, scores, text).argsort(-1, descending=True)
    assert order[0, 0, :5].tolist() == [1, 4, 2, 3, 5]


def test_without_the_prior_the_most_attended_stay_and_the_first():
    view = random_view(H=2, G=2, T=40, images=seen("iiii" + "t" * 20 + "i" * 16))
    for options, first in (({"sinks": 4}, 4), ({"sinks": 0}, 0)):
        for head, kept in enumerate(held(LookM(budget=12, text_prior=False, **options), view)[0]):
            scores = view.column_sums()[0, head].tolist()
            wanted = [float("inf") if i < first or i >= 34 else s for i, s in enumerate(scores)]
            assert kept == top(wanted, 12)
    assert held(LookM(budget=3, text_prior=False), view)[0][0] == [0, 1, 39]  # the recent share comes first


def slow(view: LayerView, row: int, method: LookM, images: str) -> list[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """The card's steps 1 to 6 for one row without padding: keys and values of what stays, by head."""
    alone, probs = row_of(view, row), full_probabilities(view, row)
    total, group, heads = probs.shape[-1], len(probs) // view.heads, []
    for head in range(view.heads):
        scores = probs[head * group : (head + 1) * group].sum((0, 1)).tolist()
        newest = int(method.budget * method.recent)
        shifted = [s - (total * group + 1 if images[i] == "i" else 0) for i, s in enumerate(scores)]
        hitters = top(shifted[: total - newest], method.budget - newest)
        stay = sorted({*hitters, *range(total - newest, total)})
        k, v = alone.keys[0, head], alone.values[0, head]
        near = {}
        for e in sorted(set(range(total)) - set(stay)):
            cosines = [F.cosine_similarity(k[e], k[c], dim=0).item() for c in stay]
            near[e] = (stay[cosines.index(max(cosines))], max(cosines))
        mean = sum(u for _, u in near.values()) / max(1, len(near))
        found = {}
        for c in stay:
            mine = [e for e in near if near[e][0] == c and (method.merge != "weighted" or near[e][1] >= mean)]
            merged = []
            for states in (k, v):
                parts = [states[e] for e in mine]
                if method.merge == "pivot":
                    parts = [(x + states[c]) / 2 for x in parts]
                elif method.merge == "weighted":
                    parts = [near[e][1] * x for e, x in zip(mine, parts, strict=True)]
                merged.append(sum(parts, states[c]) / (len(mine) + 1))
            found[c] = tuple(merged)
        heads.append(found)
    return heads


@pytest.mark.parametrize("merge", ["pivot", "average", "weighted"])
@pytest.mark.parametrize("budget", [20, 8])
def test_against_a_loop(merge, budget):
    rows = ("tt" + "i" * 16 + "ttttt" + "i" * 12 + "ttttttttt", "t" * 8 + "i" * 16 + "t" * 14)
    view = random_view(B=2, H=2, G=2, T=44, D=4, left_pad=(0, 6), seed=3, images=seen(*rows))
    method = LookM(budget=budget, merge=merge)
    got = after(method, view)
    for row in range(2):
        for head, stays in enumerate(slow(view, row, method, rows[row])):
            here = got.valid[row, head]
            assert got.positions[row, head][here].tolist() == sorted(stays)
            for slot in here.nonzero()[:, 0].tolist():
                key, value = stays[int(got.positions[row, head, slot])]
                assert_close(got.keys[row, head, slot], key, atol=1e-5, rtol=1e-4)
                assert_close(got.values[row, head, slot], value, atol=1e-5, rtol=1e-4)


@given(st.integers(2, 40), st.integers(0, 9), st.integers(1, 40), st.booleans(), st.booleans())
def test_the_budget_holds_where_there_is_an_image(length, pad, budget, prior, overrun):
    rows = ("t" + "i" * (length // 2) + "t" * length, "it")
    shown = seen(rows[0][:length], rows[1])
    view = random_view(B=2, H=2, G=2, T=length + pad, left_pad=(pad, length + pad - 2), images=shown)
    left = after(LookM(budget=budget, text_prior=prior, overrun=overrun), view)
    if prior and overrun:
        text = torch.tensor([rows[0][:length].count("t"), 1])
        assert (left.count <= view.count.clamp(max=budget).maximum(text[:, None])).all()
    else:
        assert torch.equal(left.count, view.count.clamp(max=budget))


def test_a_further_turn_knows_earlier_images_and_scores():
    view = random_view(H=2, G=2, T=30, seed=1)
    q, k, v = view.queries.states, view.keys, view.values
    layer = KVLayer(Rows(LookM(budget=9, recent=0.34)), 0)
    layer.attend(q[:, :, :20], k[:, :, :20], v[:, :, :20], None, 0.3, Plan(prefill=True, images=seen("tt" + "i" * 18)))
    before = layer.stored.tokens()[0]
    assert (before.columns[IMAGE][before.valid].view(1, 2, 9) > 0).sum(-1).tolist() == [[7, 7]]
    assert (before.columns[SCORE][before.valid] > 0).all()
    assert all(head[:2] == [0, 1] for head in layer.kept()[0])
    nothing = Images(torch.tensor([20]), torch.zeros(1, 10, dtype=torch.bool))
    layer.attend(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], None, 0.3, Plan(prefill=True, images=nothing))
    assert (layer.counts() == 9).all()
    for head in layer.kept()[0]:  # twelve tokens of text: none is left of the images
        assert set(head) <= {0, 1, *range(20, 30)} and head[-3:] == [27, 28, 29]


def test_row_alone():
    rows = ("tt" + "i" * 16 + "t" * 12, "t" * 4 + "i" * 10 + "t" * 7)
    view = random_view(B=2, H=2, G=2, T=30, D=4, left_pad=(0, 9), images=seen(*rows))
    both = held(LookM(budget=0.4), view)
    for row in range(2):
        alone = row_of(view, row)
        alone = alone.apply(Keep(alone.valid, {IMAGE: seen(rows[row]).flags[:, None].expand(1, 2, -1).float()}))
        assert held(LookM(budget=0.4), alone)[0] == both[row]


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0}, {"recent": 1.5}, {"merge": "sum"}, {"text_prior": 2}, {"sinks": -1}, {"overrun": "x"},
        {"mass": "paper"},
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        LookM(**options)
