"""What is remembered of units, what they are worth, and which are the best: kernels against plain loops."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import (  # noqa: F401  (a fixture)
    DTYPES,
    RAGGED,
    SETS,
    WIDEST,
    check_attend,
    close,
    fallbacks,
    paged,
    poison,
)
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.formats import Chosen
from kvfold.ops import _cpu, dispatch
from kvfold.ops.units import naive

OPS = ("raise_bounds", "bound_scores", "choose_units", "list_pages", "list_slots", "attend_units", "step_units")
OPS += ("key_scores", "vote_units", "step_keys")


@pytest.fixture(autouse=True, params=SETS)
def instructions(request):
    """Every test on every instruction set that this processor has."""
    _cpu.use(request.param)
    yield
    _cpu.use(WIDEST)


@pytest.fixture(autouse=True)
def handed_on(monkeypatch):
    """Operations that the CPU's versions left to the definition."""
    found = []

    def noted(name, run, *args, **options):
        found.append(name)
        return run(*args, **options)

    for name in OPS:
        monkeypatch.setattr(naive, name, functools.partial(noted, name, getattr(naive, name)))
    yield found
    torch.set_num_threads(1)


def bounds_of(keys: Tensor, valid: Tensor, unit: int, room: int) -> Tensor:
    """The largest of k and of -k of each unit, token by token."""
    b, h, _, d = keys.shape
    held = torch.full((b, h, room, 2 * d), -torch.inf, dtype=keys.dtype)
    for row, head in np.ndindex(b, h):
        for number, key in enumerate(keys[row, head][valid[row, head]]):
            place = held[row, head, number // unit]
            place.copy_(torch.maximum(place, torch.cat([key, -key])))
    return held


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "d", "unit"), [(1, 8, 4), (37, 6, 16), (64, 64, 16), (100, 12, 7)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("way", ["cpu", "naive"])
def test_bounds_rise_to_all_keys(dtype, t, d, unit, ragged, way, handed_on):
    keys = torch.randn(2, 3, t, d).to(dtype)
    keys[0, 0, 0, 0], keys[1, 1, t // 2, 1], keys[1, 0, -1, 2] = torch.nan, torch.inf, -torch.inf
    valid = torch.rand(2, 3, t) < 0.7 if ragged else torch.ones(2, 3, t, dtype=torch.bool)
    room = -(-t // unit) + 1
    held = torch.full((2, 3, room, 2 * d), -torch.inf, dtype=dtype)
    start, cut = np.zeros((2, 3), dtype=np.int64), t // 3
    with dispatch.use(way):
        for part in (slice(0, cut), slice(cut, t)):
            ops.raise_bounds(held, keys[:, :, part], valid[:, :, part], start, unit)
            start = start + valid[:, :, part].sum(-1).numpy()
    assert_close(held, bounds_of(keys, valid, unit, room), atol=0, rtol=0, equal_nan=True)
    assert handed_on == []


@pytest.mark.parametrize("way", ["cpu", "naive"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_bounds_of_16_bits_are_no_less_than_wider_keys(way, wide, handed_on):
    """The least bfloat16 that is no less, of numbers of any size; infinities stay, and NaN does."""
    keys = torch.randn(2, 2, 40, 16, dtype=wide) * 10.0 ** torch.randint(-42, 38, (2, 2, 40, 16))
    keys.view(-1)[:8] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38, 1e-45, -1e-45]).to(wide)
    held = torch.full((2, 2, 40, 32), -torch.inf, dtype=torch.bfloat16)
    with dispatch.use(way):
        ops.raise_bounds(held, keys, torch.ones(2, 2, 40, dtype=torch.bool), np.zeros((2, 2), dtype=np.int64), 1)
    both, known = torch.cat([keys, -keys], -1), ~torch.cat([keys, keys], -1).isnan()
    below = torch.nextafter(held, held.new_tensor(-torch.inf)).to(wide)
    assert (held.to(wide) >= both)[known].all() and (below < both)[known & (held > -torch.inf)].all()
    assert held.isnan().equal(~known)
    assert not handed_on or way == "naive" or wide == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1, 3, 4, 7])
@pytest.mark.parametrize("d", [4, 20, 64])
@pytest.mark.parametrize("units", [[[1, 5, 3], [4, 2, 0]], [[300, 257, 256], [8, 259, 600]], [[6] * 3] * 2], ids=str)
def test_scores_are_the_sums_of_what_bounds_allow(dtype, g, d, units, handed_on):
    number, q = np.array(units), torch.randn(2, 3, g, d)
    low, high = torch.randn(2, 2, 3, number.max(), d).sort(0).values
    held = torch.cat([high, -low], -1).to(dtype)
    there = torch.arange(held.shape[2]) < torch.from_numpy(number)[..., None]
    held = torch.cat([held.masked_fill(~there[..., None], torch.nan), held[:, :, :2] * torch.nan], 2)  # what is not
    with dispatch.use("cpu"):
        found = ops.bound_scores(q, held, number)
    high, low = held[:, :, : number.max()].double().nan_to_num().chunk(2, -1)
    asked = q.double()[:, :, :, None]
    want = torch.maximum(asked * high[:, :, None], -asked * low[:, :, None]).sum(-1)
    mask = there[:, :, None].expand(found.shape)
    assert found.shape == (2, 3, g, number.max()) and found[~mask].eq(-torch.inf).all()
    close("scores", found[mask], want[mask], share=1e-5)
    torch.set_num_threads(3)
    with dispatch.use("cpu"):
        assert torch.equal(ops.bound_scores(q, held, number), found)
    clean = held.masked_fill(held.isnan(), -torch.inf)  # the definition multiplies what is not there
    with dispatch.use("naive"):
        close("naive", ops.bound_scores(q, clean, number)[mask], want[mask], share=1e-5)
    assert set(handed_on) <= {"bound_scores"}  # by `dispatch`, for the last


def test_what_is_no_number_shows_in_scores():
    q, held = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 9, 16)
    q[0, 0, 1, 3] = held[0, 0, 8, 5] = torch.nan
    with dispatch.use("cpu"):
        found = ops.bound_scores(q, held, np.array([[9]]))[0, 0]
    assert found[1].isnan().all() and found[:, 8].isnan().all() and found[[0, 2], :8].isfinite().all()


def test_widths_that_no_vector_divides_are_left_to_the_definition(handed_on):
    with dispatch.use("cpu"):
        ops.bound_scores(torch.randn(1, 1, 2, 5), torch.randn(1, 1, 4, 10), np.array([[4]]))
    assert handed_on == ["bound_scores"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1, 3, 7])
@pytest.mark.parametrize("d", [4, 20, 64])
@pytest.mark.parametrize("units", [[[1, 5, 3], [4, 2, 0]], [[300, 257, 256], [8, 259, 600]]], ids=str)
def test_scores_of_keys_are_products_in_steps(dtype, g, d, units, handed_on):
    number, q = np.array(units), torch.randn(2, 3, g, d)
    there = torch.arange(number.max() + 2) < torch.from_numpy(number)[..., None]
    held = torch.randn(2, 3, number.max() + 2, d).to(dtype).masked_fill(~there[..., None], torch.nan)
    with dispatch.use("cpu"):
        found = ops.key_scores(q, held, number, 256)
    assert "key_scores" not in handed_on
    with dispatch.use("naive"):
        same = ops.key_scores(q, held.nan_to_num(), number, 256)
    want = q.double() @ held.double().nan_to_num().mT
    for scores in (found, same):
        mask = there[:, :, None, : number.max()].expand(scores.shape)
        assert scores[~mask].eq(-torch.inf).all() and (scores[mask] * 256 % 1 == 0).all()
        assert (scores[mask] - want[..., : number.max()][mask]).abs().max() <= 0.5 / 256 + 1e-4


@settings(max_examples=60, deadline=None)
@given(
    units=st.lists(st.integers(0, 90), min_size=3, max_size=3), room=st.integers(0, 100),
    heads=st.sampled_from(["sum", "max"]),
    ends=st.tuples(st.integers(0, 9), st.integers(0, 9)), scale=st.sampled_from([1.0, 0.25]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_best_units_by_soft_votes(units, room, heads, ends, scale, seed):
    """What is read anyhow, then the highest sums, or maxima, of softmaxes over the rest; a tie goes to the earlier."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(-9, 9, (3, 4, max(units)))).float()
    number, wide = np.array(units), np.full(3, room)
    first, before = (np.minimum(np.full(3, end), max(0, room - 1) // 2) for end in ends)
    given = (scores, number, wide, first, before)
    found = {}
    for way in ("cpu", "naive"):
        with dispatch.use(way):
            found[way] = ops.vote_units(*given, heads=heads, scale=scale)
    for row, count in enumerate(units):
        forced = [u for u in range(count) if u < first[row] or u >= count - 1 - before[row]]
        free = [u for u in range(count) if u not in forced]
        votes = (scores[row][:, free].double() * scale).softmax(-1)
        worth = votes.sum(0) if heads == "sum" else votes.amax(0)
        for way, (numbers, counts) in found.items():
            mine = numbers[row][: counts[row]].tolist()
            assert len(mine) == min(room, count) and mine == sorted(mine), way
            assert set(forced) <= set(mine) or room < len(forced), way
            picked = [free.index(u) for u in mine if u not in forced]
            left = [n for n in range(len(free)) if n not in picked]
            if picked and left:  # none that was left is worth more, but for rounding
                assert worth[picked].min() >= worth[left].max() - 1e-6, way


def test_soft_votes_of_many_threads_are_those_of_one():
    scores = torch.randn(3, 9, 5000) * 3
    given = scores, np.array([5000, 4999, 17]), np.array([300, 4000, 16]), np.array([4, 4, 4]), np.array([9, 9, 9])
    many = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        many[threads] = ops.vote_units(*given, heads="sum", scale=1.0)
    assert all((one == two).all() for one, two in zip(many[1], many[3], strict=True))
    with dispatch.use("naive"):
        numbers, counts = ops.vote_units(*given, heads="sum", scale=1.0)
    assert (counts == many[1][1]).all() and (numbers != many[1][0]).mean() < 0.01


def chosen_of(line: np.ndarray, units: int, room: int, sinks: int, recent: int) -> list[int]:
    """One by one: the last, the first, the newest before the last, then the highest."""
    ranks, most = list[tuple[float, float, int]](), min(room, units)
    sinks = min(sinks, most - 1)
    recent = min(recent, most - 1 - sinks)  # the nearest
    for place, score in enumerate(line[:units].tolist()):
        worth = -float(np.finfo(np.float32).max) if score != score else score
        kind = 3 if place == units - 1 else 2 if place < sinks else 1 if place >= units - 1 - recent else 0
        if kind or worth > -np.inf:
            ranks.append((-kind, 0.0 if kind else -worth, place))
    return sorted(place for *_, place in sorted(ranks)[:room])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 90), min_size=4, max_size=4),
    room=st.lists(st.integers(0, 40), min_size=2, max_size=2),
    heads=st.sampled_from(["each", "sum", "max"]), forced=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    levels=st.sampled_from([1, 3, 1000]), strange=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_best_units_are_chosen(counts, room, heads, forced, levels, strange, seed):
    rng, units = np.random.default_rng(seed), np.array(counts).reshape(2, 2)
    scores = rng.integers(0, levels, (2, 2, 3, units.max() + 1)).astype(np.float32)  # whole numbers: sums are exact
    if strange:
        for value in (np.nan, np.inf, -np.inf):
            scores[rng.random(scores.shape) < 0.1] = value
    every = torch.from_numpy(scores)
    line = {"each": every, "sum": every.sum(2, keepdim=True), "max": every.amax(2, keepdim=True)}[heads].numpy()
    found = {}
    for way in ("cpu", "naive"):
        there = np.arange(scores.shape[-1]) < units[..., None]
        given_scores = scores if way == "cpu" else np.where(there[:, :, None], scores, -np.inf)
        given_scores = torch.from_numpy(given_scores.astype(np.float32))
        with dispatch.use(way):
            numbers, number = ops.choose_units(
                given_scores, units, np.array(room), heads=heads, sinks=forced[0], recent=forced[1]
            )
        rows = list(zip(numbers.reshape(number.size, numbers.shape[-1]), number.flat, strict=True))
        found[way] = [row[:n].tolist() for row, n in rows]
        assert all((row[n:] == -1).all() for row, n in rows)
    want = [
        chosen_of(line[row, head, s], units[row, head], room[row], *forced)
        for row, head, s in np.ndindex(*line.shape[:3])
    ]
    assert found["cpu"] == want and found["naive"] == want


@pytest.mark.parametrize("heads", ["each", "sum", "max"])
@pytest.mark.parametrize(("n", "room"), [(5000, 64), (5000, 4999), (3000, 1), (130, 100)])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "level"])
def test_many_units(heads, n, room, order):
    scores = torch.randint(0, 10_000, (2, 2, 3, n)).float()
    rising = scores.sort(-1)[0]
    scores = {"random": scores, "rising": rising, "falling": rising.flip(-1), "level": scores * 0}[order]
    units, many = np.array([[n, n - 1], [n - 17, 3]]), np.array([room, room // 2 + 1])
    there = torch.arange(n) < torch.from_numpy(units)[..., None]
    scores = scores.masked_fill(~there[:, :, None], -torch.inf)
    found = {}
    for way in ("cpu", "naive"):
        torch.set_num_threads(3 if way == "cpu" else 1)
        with dispatch.use(way):
            found[way] = ops.choose_units(scores, units, many, heads=heads, sinks=2, recent=3)
    masks = [Chosen(*each, n).mask for each in found.values()]
    assert (masks[0] == masks[1]).all() and masks[0].any()
    assert (found["cpu"][1] == masks[0].sum(-1)).all() and (np.diff(found["cpu"][0][0, 0, 0]) > 0).all()


@pytest.mark.parametrize(("op", "page", "unit"), [("pages", 4, 4), ("pages", 4, 12), ("slots", 16, 1), ("slots", 4, 7)])
def test_lists_are_of_what_a_row_holds(op, page, unit, handed_on):
    table, before = paged([37, 0, 16, 5], page=page), np.array([0, 4, 8, unit])
    most = -(-(45 + int(before.max())) // unit)
    mask = np.random.default_rng(0).random((4, 3, most)) < 0.5
    numbers, _ = naive.listed(mask)
    found = {}
    for way in ("cpu", "naive"):
        with dispatch.use(way):
            if op == "pages":
                found[way] = ops.list_pages(table, numbers, unit // page, before // page)
            else:
                found[way] = ops.list_slots(table, numbers, unit, before)
    for row, s in np.ndindex(4, 3):
        tokens = [i for i in range(table.lengths[row]) if mask[row, s, (i + int(before[row])) // unit]]
        slots = [int(table.table[row, i // page]) * page + i % page for i in tokens]
        want = slots if op == "slots" else list(dict.fromkeys(slot // page for slot in slots))
        for way, (listed, lengths) in found.items():
            line = listed[row * 3 + s]
            assert line[: len(want)].tolist() == want and (line[len(want) :] == -1).all(), way
            assert lengths[row * 3 + s] == len(tokens), way
    assert handed_on.count(f"list_{op}") <= 1  # by `dispatch`, for the definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1, 3, 8])
@pytest.mark.parametrize(("d", "dv"), [(16, 16), (64, 80), (20, 24)])
def test_tokens_that_are_pages_of_their_own(dtype, g, d, dv, fallbacks):  # noqa: F811  (a fixture)
    check_attend(torch.randn(2, 4, g, 1, d).to(dtype), paged(RAGGED, d, dv, dtype, page=1), d**-0.5)
    assert fallbacks == []


def test_arrays_that_do_not_fit_are_refused():
    q, held, units = np.zeros((2, 3, 8), np.float32), np.zeros((2, 5, 16), np.float32), np.array([5, 6])
    with pytest.raises(ValueError, match="units go beyond held"):
        _cpu.bound_scores(q, held, units, False, 0.0, 1, np.zeros((2, 3, 6), np.float32))
    with pytest.raises(ValueError, match="shapes of q, held"):
        _cpu.bound_scores(q[:, :, :4].copy(), held, units, False, 0.0, 1, np.zeros((2, 3, 5), np.float32))
    with pytest.raises(ValueError, match="shapes of q, held"):
        _cpu.bound_scores(q, held, units, True, 0.0, 1, np.zeros((2, 3, 5), np.float32))
    scores, out, many = np.zeros((2, 3, 5), np.float32), np.zeros((2, 4), np.int32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="units go beyond scores"):
        _cpu.choose_units(scores, np.array([6, 1]), np.array([2, 2]), "max", 0, 0, 1, out, many)
    with pytest.raises(ValueError, match="heads must be"):
        _cpu.choose_units(scores, np.array([5, 1]), np.array([2, 2]), "all", 0, 0, 1, out, many)
    with pytest.raises(ValueError, match="tokens go beyond held"):
        _cpu.raise_bounds(held, np.zeros((2, 3, 8), np.float32), np.ones((2, 3), bool), np.array([0, 9]), 2, 1)
    two = np.array([2, 2])
    with pytest.raises(ValueError, match="heads must be sum or max"):
        _cpu.vote_units(scores, two, two, two, two, "each", 1.0, 1, out, many)
    with pytest.raises(ValueError, match="units go beyond scores"):
        _cpu.vote_units(scores, two + 4, two, two, two, "sum", 1.0, 1, out, many)
    with pytest.raises(ValueError, match="below 0"):
        _cpu.vote_units(scores, two, two, two, two - 3, "sum", 1.0, 1, out, many)
    with pytest.raises(ValueError, match="scores' lists"):
        _cpu.vote_units(scores, two, two[:1], two, two, "sum", 1.0, 1, out, many)
    table, lengths = np.zeros((1, 2), np.int32), np.array([9], np.int32)
    with pytest.raises(ValueError, match="lengths go beyond the table"):
        numbers = np.zeros((1, 3), np.int32)
        _cpu.list_pages(numbers, table, lengths, 4, False, 1, np.array([0]), numbers.copy(), many[:1])
