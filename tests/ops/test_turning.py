"""Vectors that turn with positions, keys that turn as they are read, and a step that every key is asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cpu_kernels import DTYPES, paged, poison
from test_units import handed_on, instructions  # noqa: F401  (fixtures)
from test_units_at_once import near
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.formats import ByKeys
from kvfold.ops import _cpu, dispatch
from kvfold.ops.paged import naive as paged_naive
from kvfold.ops.turn import Pairs, naive
from kvfold.pages import FewSlots, PagePool, PageTable, Plane
from kvfold.rotation import Compact


class Turner:
    """A rotation that says how it turns."""

    def __init__(self, half: int = 8, first: int = 0, *, neighbours: bool = False):
        self.pairs = Pairs((10_000.0 ** -(np.arange(half) / half)).astype(np.float32), first, neighbours)

    def shift(self, x: Tensor, steps: Tensor) -> Tensor:
        return ops.turn(x, steps, self.pairs)


def exact(x: Tensor, steps: Tensor, pairs: Pairs) -> Tensor:
    """The same in float64, of angles that are floats."""
    angles = (torch.from_numpy(pairs.angles) * steps[..., None].float()).double()
    first, half, turned = pairs.first, len(pairs.angles), x.double().clone()
    one = first + torch.arange(half) * (2 if pairs.neighbours else 1)
    other = one + (1 if pairs.neighbours else half)
    a, b = x.double()[..., one], x.double()[..., other]
    turned[..., one], turned[..., other] = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return turned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize(("size", "half", "first"), [(16, 8, 0), (80, 16, 0), (48, 8, 16), (128, 64, 0), (24, 4, 12)])
def test_vectors_turn(dtype, alike, neighbours, size, half, first, monkeypatch):
    """Every channel that turns by its angle, the others not at all; as far as a text may be long."""
    monkeypatch.setattr(naive, "turn", None)  # nothing is left to the definition
    pairs, x = Turner(half, first, neighbours=neighbours).pairs, torch.randn(2, 3, 150, size).to(dtype)
    x[1, 1, 7, 5] = torch.nan
    steps = torch.randint(-200_000, 200_000, (2, 3, 150), dtype=torch.int32)
    steps[0, :, :4] = torch.tensor([0, 1, -1, 3])
    steps = steps[:, :1].expand(2, 3, 150) if alike else steps
    got, want = ops.turn(x, steps, pairs), exact(x, steps, pairs)
    assert got.dtype == dtype
    eps = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert_close(got.double(), want, atol=10 * eps if dtype == torch.float32 else 4 * eps, rtol=2 * eps, equal_nan=True)
    if dtype == torch.float32:
        still = [*range(first), *range(first + 2 * half, size)]
        assert torch.equal(got[..., still].nan_to_num(), x[..., still].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_widths_and_nothing_are_turned_by_the_definition(dtype):
    """Six channels that turn are no whole vectors; of no token there is nothing to do."""
    pairs = Pairs(np.array([1.0, 0.1, 0.01], np.float32), 0)
    x, steps = torch.randn(1, 2, 5, 10).to(dtype), torch.arange(5).expand(1, 2, 5)
    near(ops.turn(x, steps, pairs), exact(x, steps, pairs).float(), dtype)
    assert ops.turn(x[:, :, :0], steps[..., :0], pairs).shape == (1, 2, 0, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mass", [None, "log_mass"])
@pytest.mark.parametrize(("half", "neighbours"), [(8, False), (4, False), (8, True), (4, True)])
@pytest.mark.parametrize("least", [None, (4000, 0)])
def test_keys_turn_as_they_are_read(dtype, mass, half, neighbours, least, monkeypatch):
    """Tokens of lists stand side by side, or none further in front than a place; no slot but theirs is read.

    Lists have more than one part, one token, or none.
    """
    lengths = [700, 0, 1, 70]
    table, q = paged(lengths, 16, 24, dtype), torch.randn(2, 2, 3, 1, 16).to(dtype)
    compact = Compact(Turner(half, neighbours=neighbours), least=None if least is None else torch.tensor(least))
    table.pool.planes["position"].copy_(torch.randint(0, 9000, table.pool.planes["position"].shape, dtype=torch.int32))
    poison(table)
    numbers = np.full((4, 1, 600), -1, dtype=np.int32)
    for row, length in enumerate(lengths):
        some = np.sort(np.random.default_rng(row).permutation(length)[: min(600, length)])
        numbers[row, 0, : len(some)] = some
    few = FewSlots(table, *ops.list_slots(table, numbers, 1, np.zeros(4, dtype=np.int64)))
    with dispatch.use("naive"):
        want = ops.attend_pages(q.float() if dtype == torch.float32 else q, few, 0.3, mass=mass, compact=compact)
    monkeypatch.setattr(paged_naive, "attend_pages", None)  # nothing is left to the definition
    out, lse, _ = ops.attend_pages(q, few, 0.3, mass=mass, compact=compact)
    assert out.dtype == dtype
    loose = (
        {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    )  # the definition rounds keys that have turned
    assert_close(out.float(), want[0].float(), **(loose or {"atol": 1e-5, "rtol": 1e-5}))
    assert_close(lse, want[1], **(loose or {"atol": 1e-4, "rtol": 1e-4}))


def by_keys(held: Tensor, *, layer: bool, slots: bool, heads: str) -> ByKeys:
    """Of two rows, of which ten and seven tokens are read."""
    first, before = np.array([2, 1]), np.array([3, 2])
    return ByKeys(
        held, np.array([10, 7]), first, before, np.array([True, True]), heads, layer, 0.5, 256, 20, Turner(), slots
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize(("layer", "heads"), [(True, "sum"), (False, "max")])
@pytest.mark.parametrize("scattered", [True, False])
def test_a_step_of_keys_is_its_parts_one_after_another(dtype, slots, layer, heads, scattered, handed_on):  # noqa: F811
    """A token is written and remembered, heads vote, what they choose is read; few tokens are all read."""
    ways = {}
    for way in ("cpu", "naive", "parts"):
        torch.manual_seed(1)
        planes = {"keys": Plane(16, dtype), "values": Plane(24, dtype), "position": Plane(None, torch.int32)}
        table = PageTable(PagePool(planes, torch.device("cpu"), 4), 4, scattered=scattered)
        by, said = by_keys(torch.zeros(2, 2, 40, 16, dtype=torch.bfloat16), layer=layer, slots=slots, heads=heads), []
        for number in range(35):
            q, place, seen = torch.randn(2, 2, 3, 16).to(dtype), 3 * number, np.full(2, 3 * number + 1)
            new = {"keys": torch.randn(4, 1, 16).to(dtype), "values": torch.randn(4, 1, 24).to(dtype)}
            new["position"] = torch.tensor([[place]]).expand(4, 1)
            by = replace(by, chooses=number + 1 > by.room)
            if way == "parts":
                said.append(in_parts(q, table, new, by, seen))
            else:
                with dispatch.use(way):
                    said.append(ops.step_keys(q, table, new, by, seen, 0.3))
        dense = [table.dense(name) for name in ("keys", "values", "position")]
        ways[way] = [*dense, by.held, *(torch.stack(each) for each in zip(*said, strict=True))]
    for one, two in zip(ways["cpu"], ways["parts"], strict=True):
        assert torch.equal(one, two)
    assert "step_keys" not in handed_on
    for one, two in zip(ways["cpu"], ways["naive"], strict=True):
        if dtype == torch.float32:
            near(one, two, torch.bfloat16 if one is by.held else dtype)


def in_parts(
    q: Tensor, table: PageTable, new: dict[str, Tensor], by: ByKeys, seen: np.ndarray
) -> tuple[Tensor, Tensor]:
    """What `step_keys` does, by the operations that others have, too."""
    (b, h, g, d), place = q.shape, new["position"].view(2, 2, 1)
    ops.append_pages(table, new, None)
    units = table.lengths.astype(np.int64).reshape(b, h)
    by.held[:, :, units[0, 0] - 1] = by.rope.shift(new["keys"].view(b, h, 1, d), -place)[:, :, 0].to(by.held.dtype)

    def turned(steps: np.ndarray) -> Tensor:
        return by.rope.shift(q, torch.from_numpy(steps.reshape(b, -1, 1)).expand(b, h, g))

    scores = ops.key_scores(turned(by.distance - (seen - 1)), by.held, units, by.steps)
    lists = 1 if by.layer else h
    terms = [x.repeat(lists) for x in (by.room, by.first, by.before)]
    numbers, _ = ops.vote_units(
        scores.reshape(b * lists, -1, scores.shape[-1]), units[:, :lists].reshape(-1), *terms, heads=by.heads,
        scale=by.scale,
    )  # fmt: skip
    wide = np.ascontiguousarray(numbers.repeat(h // lists, 0))[:, None]
    few = FewSlots(table, *ops.list_slots(table, wide, 1, np.zeros(4, dtype=np.int64)))
    asks, compact = q, None
    if by.slots:
        back = np.where(by.chooses[:, None], few.lengths.astype(np.int64).reshape(b, h) - seen[:, None], 0)
        asks, compact = turned(back), Compact(by.rope, rows=torch.from_numpy(by.chooses))
    out, lse, _ = ops.attend_pages(asks[:, :, :, None], few, 0.3, compact=compact)
    return [out[:, :, :, 0], lse[..., 0]]


def test_what_turns_must_fit():
    x, steps, out = np.zeros((2, 3, 5, 16), np.float32), np.zeros((2, 5), np.int32), np.zeros((2, 3, 5, 16), np.float32)
    angles = np.ones(8, np.float32)

    def turn(x=x, steps=steps, angles=angles, first=0, out=out):
        _cpu.turn(x, steps, angles, first, False, 1, out)

    turn()
    for options, match in [
        ({"angles": np.ones(12, np.float32)}, "angles must be of channels"),
        ({"first": 4}, "angles must be of channels"),
        ({"first": -4}, "angles must be of channels"),
        ({"angles": angles[:0].copy()}, "angles must be of channels"),
        ({"steps": steps[:1].copy()}, "steps must be"),
        ({"out": out[:1].copy()}, "out must have"),
        ({"angles": angles[:6].copy()}, "multiples of 4"),
    ]:
        with pytest.raises(ValueError, match=match):
            turn(**options)


def test_what_is_asked_of_every_key_must_fit():
    """Nothing is written before all is known to fit."""
    q, new, place = np.zeros((2, 3, 8), np.float32), np.ones((2, 1, 8), np.float32), np.zeros((2, 1, 1), np.int32)
    held, keys, places = np.zeros((2, 20, 8), np.uint16), np.zeros((40, 8), np.float32), np.zeros((40, 1), np.int32)
    table, lengths = np.arange(10, dtype=np.int32).reshape(2, 5), [17, 17]
    out, lse = np.zeros((2, 3, 8), np.float32), np.zeros((2, 3), np.float32)
    one = np.array([3], np.int64)

    def step(
        k=new, lengths=lengths, table=table, held=held, heads="sum", layer=True, room=one, first=one, angles=4,
        chooses=(True,),
    ):  # fmt: skip
        counts = np.array(lengths, dtype=np.int32)
        _cpu.step_keys(
            q, False, k, new, place, held, 256.0, 4, one, room, first, one, np.array(chooses), heads, layer, 1.0, True,
            np.ones(angles, np.float32), 0, False, keys, keys.copy(), places, table, counts, 4, 0.3, 1, out, lse,
        )  # fmt: skip

    step()
    assert keys.any() and held.any()
    keys[:], held[:] = 0, 0
    for options, match in [
        ({"lengths": [21, 21]}, "beyond the table or held"),
        ({"lengths": [0, 0]}, "beyond the table or held"),
        ({"lengths": [17, 16]}, "as many tokens"),
        ({"held": held[:, :16].copy()}, "beyond the table or held"),
        ({"table": table + 6}, "names a page that the pool does not have"),
        ({"k": np.zeros((2, 2, 8), np.float32)}, "one token of each row"),
        ({"k": new.astype(np.int16)}, "shapes or dtypes"),
        ({"heads": "each"}, "sum or max"),
        ({"room": np.array([3, 3, 3], np.int64)}, "KV heads of each row"),
        ({"first": np.array([3, 3], np.int64)}, "batch's rows"),
        ({"first": np.array([-1], np.int64)}, "at least 0"),
        ({"angles": 8}, "angles must be"),
        ({"chooses": (True, False)}, "chooses must have"),
    ]:
        with pytest.raises(ValueError, match=match):
            step(**options)
        assert not keys.any() and not held.any()
