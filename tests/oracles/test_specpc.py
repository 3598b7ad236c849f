"""SpecPC against its card: a draft's attention chooses tokens and their neighbours; the model reads those alone."""

import pytest
import torch
from torch.testing import assert_close

import kvfold
from drafters import drafter_folder
from kvfold.hf.call.rewriting import Raw
from kvfold.methods.specpc import SpecPC
from models import build, dynamic, feed, follow, reference, subject, tokens
from views import random_view, spared

STEPS = torch.arange(5, 13).view(2, 4)


def raw(prompt, model) -> Raw:
    return Raw(prompt["input_ids"], prompt["attention_mask"].bool(), model, kvfold.Cache)


def peaked() -> torch.Tensor:
    importance = torch.linspace(0.001, 0.002, 16)
    importance[5], importance[10] = 1.0, 0.5
    return importance


@pytest.mark.parametrize(("neighbours", "expected"), [(3, [4, 5, 6, 9, 10, 14, 15]), (0, [5, 10, 11, 12, 13, 14, 15])])
def test_oracle_neighbours(neighbours, expected):
    method = SpecPC(window=2, kernel=1, neighbours=neighbours)
    assert method.select(peaked(), 7).tolist() == expected


@pytest.mark.parametrize(("neighbours", "first", "last"), [(32, -15, 16), (64, -31, 32), (3, -1, 1), (2, 0, 1)])
def test_oracle_one_more_on_the_right(neighbours, first, last):
    importance = torch.zeros(200)
    importance[100] = 1.0
    found = SpecPC(window=1, kernel=1, neighbours=neighbours).select(importance, neighbours + 1)
    assert found.tolist() == [*range(100 + first, 101 + last), 199]


def test_oracle_the_nearest_come_first():
    importance = torch.zeros(100)
    importance[50] = 1.0
    assert SpecPC(window=1, kernel=1, neighbours=9).select(importance, 6).tolist() == [48, 49, 50, 51, 52, 99]


def slow_select(importance: list[float], count: int, window: int, kernel: int, neighbours: int, pool: str) -> list[int]:
    """The card's steps 4 to 7, with lists."""
    length, left = len(importance), (kernel - 1) // 2
    row = [0.0] * left + importance + [0.0] * (kernel - 1 - left)
    pooled = [max(row[i : i + kernel]) if pool == "max" else sum(row[i : i + kernel]) / kernel for i in range(length)]
    best = sorted(range(length), key=lambda i: (-pooled[i], i))[:count]
    reach = (neighbours - 1) // 2
    offsets = sorted(range(-reach, neighbours - reach), key=abs) if neighbours else [0]
    named = [min(max(i + offset, 0), length - 1) for i in best for offset in offsets]
    return sorted(list(dict.fromkeys([*spared(length, count, window), *named]))[:count])


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize(
    ("length", "count", "window", "kernel", "neighbours"),
    [
        (100, 30, 8, 5, 5),
        (100, 99, 4, 8, 6),
        (63, 20, 30, 1, 3),
        (40, 7, 2, 64, 64),
        (9, 1, 4, 3, 0),
        (5, 4, 64, 64, 2),
    ],
)
def test_select_against_a_loop(length, count, window, kernel, neighbours, pool):
    # Small integers have no rounding: sums of a pool are exact, and there are ties.
    importance = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(length)).float()
    method = SpecPC(window=window, kernel=kernel, neighbours=neighbours, pool=pool)
    found = method.select(importance, count).tolist()
    if pool == "max" or kernel in (1, 8, 64):
        assert found == slow_select(importance.tolist(), count, window, kernel, neighbours, pool)
    assert len(found) == count and found == sorted(set(found))
    assert set(spared(length, count, window)) <= set(found)


def test_oracle_weights_of_the_window():
    """0, 1/4, 1/2, 3/4, 1: the oldest query never counts."""
    view = random_view(B=2, H=2, G=2, T=20, left_pad=(0, 17), seed=2)
    weights = torch.linspace(0, 1, 5)
    got = SpecPC(window=5, queries="max").looked_at(view)
    assert_close(got[0], (view.attention(5)[0] * weights[:, None]).amax((0, 1, 2)))
    three = view.attention(3)[1] * torch.tensor([0, 0.5, 1])[:, None]  # a prompt of three tokens has a window of three
    assert_close(got[1], three.amax((0, 1, 2)))
    assert_close(SpecPC(window=5, weighted=False).looked_at(view)[0], view.attention(5)[0].amax((0, 1, 2)))
    mixed = SpecPC(window=5, queries="mean").looked_at(view)[0]
    assert_close(mixed, (view.attention(5)[0] * weights[:, None]).sum(2).amax((0, 1)))
    assert_close(SpecPC(window=1).looked_at(view), view.attention(1).amax((1, 2, 3)))


def probabilities(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Attention (Hq, T, T) of each layer over one text, all of it read at once."""
    views = []
    cache = kvfold.Cache(model, "full")
    with cache.observed(views.append):
        feed(model, cache, ids, torch.ones_like(ids))
    return [view.attention(ids.shape[1])[0].flatten(0, 1) for view in views]


def slow_importance(model, ids, said: torch.Tensor, window: int, reduce: str, skip: int = 0) -> torch.Tensor:
    """The card's steps 1 to 3 over one text: prompt, and all that the draft says but its last token."""
    length, parts = ids.shape[1], []
    for probs in probabilities(model, torch.cat([ids, said], 1))[skip:]:
        for i in range(window):
            parts.append(probs[:, length - window + i, :length] * (i / (window - 1)))
        parts += [probs[:, length + j, :length] for j in range(said.shape[1])]
    whole = torch.cat(parts)
    return whole.amax(0) if reduce == "max" else whole.sum(0)


@pytest.mark.parametrize(("reduce", "lookahead", "skip"), [("max", 1, 0), ("max", 4, 1), ("mean", 4, 0)])
def test_importance_against_a_loop(reduce, lookahead, skip):
    prompt = tokens(40, 23)
    method = SpecPC(window=6, queries=reduce, reduce=reduce, lookahead=lookahead, skip=skip)
    given = raw(prompt, subject("llama"))
    found = method.importance(given)
    said = given.look_ahead(lookahead, lambda view: None)[0]
    for row, length in enumerate((40, 23)):
        own = prompt["input_ids"][row : row + 1, -length:]
        expected = slow_importance(subject("llama"), own, said[row : row + 1, :-1], 6, reduce, skip)
        assert_close(found[row, :length], expected, atol=1e-5, rtol=1e-4)


def test_oracle_a_layer_that_never_holds_the_maximum_may_be_left_out():
    given = raw(tokens(30), subject("llama"))
    found = [SpecPC(window=8, skip=skip).importance(given) for skip in (0, 1)]
    (first, *_) = probabilities(subject("llama"), given.ids)
    held = (first[:, -8:] * torch.linspace(0, 1, 8)[:, None]).amax((0, 1))
    below = held < found[1][0]
    assert below.any() and torch.equal(found[0][0][below], found[1][0][below])
    assert_close(found[0][0], torch.maximum(held, found[1][0]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [0.3, 9], ids=str)
def test_oracle_the_model_reads_a_shorter_text(budget):
    prompt = tokens(40, 23)
    given = raw(prompt, subject("llama"))
    method = SpecPC(budget=budget, window=4, kernel=3, neighbours=3)
    order = method.read_order(given)
    cache = kvfold.Cache(subject("llama"), method)
    got = follow(subject("llama"), cache, *prompt.values(), STEPS)
    for row, length in enumerate((40, 23)):
        own = order[row][order[row] >= 0]
        count = int(0.3 * length) if budget == 0.3 else 9
        assert len(own) == count and own[-4:].tolist() == [36, 37, 38, 39] and own.tolist() == sorted(set(own.tolist()))
        assert own.min() >= 40 - length
        short = prompt["input_ids"][row : row + 1, own]
        model = reference("llama")
        expected = follow(model, dynamic(model), short, torch.ones_like(short), STEPS[row : row + 1])
        assert_close(got[row], expected[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [1.0, 40, 64])
def test_oracle_a_prompt_that_fits_is_read_whole(budget):
    prompt = tokens(40, 23)
    assert SpecPC(budget=budget).read_order(raw(prompt, None)) is None


def test_a_row_that_fits_stays_whole_beside_one_that_does_not():
    prompt = tokens(40, 6)
    order = SpecPC(budget=9, window=2).read_order(raw(prompt, subject("llama")))
    assert order.shape == (2, 9) and order[1].tolist() == [-1, -1, -1, *range(34, 40)]


def test_rows_equal_single_rows_and_another_draft_chooses_otherwise(tmp_path):
    prompt, folder = tokens(40, 23), drafter_folder(tmp_path)
    chosen = []
    for draft in (None, folder):
        method = SpecPC(budget=8, draft=draft, window=2, kernel=1, neighbours=0, lookahead=3)
        both = method.read_order(raw(prompt, subject("llama")))
        chosen.append(both.tolist())
        for row, length in enumerate((40, 23)):
            own = prompt["input_ids"][row : row + 1, -length:]
            alone = method.read_order(Raw(own, torch.ones_like(own).bool(), subject("llama"), kvfold.Cache))
            assert (alone + 40 - length).tolist() == both[row : row + 1].tolist()
    assert chosen[0] != chosen[1]


def test_generate_answers_behind_the_given_prompt():
    prompt = tokens(40, 23)
    model = build("llama")
    cache = kvfold.Cache(model, "specpc", budget=0.25)
    out = model.generate(**prompt, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, :40], prompt["input_ids"]) and out.shape == (2, 45)
    assert [core.counts().tolist() for core in cache.paged] == [[[14, 14], [9, 9]]] * 3  # 4 more, the fifth unread


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 must be"),
        ({"draft": ""}, "draft='' must be a model's name or folder, or None"),
        ({"window": 0}, "window=0 must be an int >= 1"),
        ({"kernel": 0}, "kernel=0 must be an int >= 1"),
        ({"neighbours": -1}, "neighbours=-1 must be an int >= 0"),
        ({"pool": "sum"}, "pool='sum' must be one of 'max', 'avg'"),
        ({"queries": "sum"}, "queries='sum' must be one of 'max', 'mean'"),
        ({"reduce": "sum"}, "reduce='sum' must be one of 'max', 'mean'"),
        ({"skip": -1}, "skip=-1 must be an int >= 0"),
        ({"lookahead": 0}, "lookahead=0 must be an int >= 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SpecPC(**options)
