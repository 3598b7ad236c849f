"""Units that are chosen by bounds and read, and a token written before that, in one operation."""

import numpy as np
import pytest
import torch
from test_cpu_kernels import DTYPES, paged, poison
from test_units import bounds_of, handed_on, instructions  # noqa: F401  (fixtures)
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.formats import Chosen
from kvfold.ops import _cpu, dispatch
from kvfold.pages import PagePool, PageTable, Plane


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """But for the order of sums, and the rounding of a narrow type."""
    assert_close(
        got.float(), want.float(), atol=1e-5, rtol=1e-5 + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    )


def states_of(table: PageTable, name: str) -> Tensor:
    """What a table of two rows with two heads holds, (2, 2, T, ...)."""
    plane = table.dense(name)
    return plane.view(2, 2, *plane.shape[1:])


def bounds_on(table: PageTable, unit: int, room: int) -> Tensor:
    return bounds_of(states_of(table, "keys"), table.valid().view(2, 2, -1), unit, room)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", ["each", "sum", "max"])
@pytest.mark.parametrize(("page", "unit"), [(4, 4), (4, 12), (16, 16)])
@pytest.mark.parametrize("mass", [None, "log_mass"])
def test_few_units_are_chosen_and_read_at_once(dtype, heads, page, unit, mass, handed_on):  # noqa: F811  (a fixture)
    lengths = [157, 0, 16, 70]
    table, q = paged(lengths, 16, 24, dtype, page), torch.randn(2, 2, 3, 16).to(dtype)
    held, room = bounds_on(table, unit, -(-157 // unit) + 1), np.array([3, 2])
    poison(table)
    units, found = (-(-table.lengths.astype(np.int64) // unit)).reshape(2, 2), {}
    with dispatch.use("naive"):
        scores = ops.bound_scores(q, held, units)
        numbers, counts = ops.choose_units(scores, units, room, heads=heads, sinks=1, recent=0)
    chosen = Chosen(numbers, counts, int(units.max())).mask
    for way in ("cpu", "naive"):
        with dispatch.use(way):
            found[way] = ops.attend_units(
                q, held, table, room, 0.3, unit=unit, heads=heads, sinks=1, recent=0, mass=mass
            )
    keys, values = states_of(table, "keys").float(), states_of(table, "values").float()
    logits = q.float() @ keys.mT * 0.3 + (0.0 if mass is None else states_of(table, mass)[:, :, None])
    read = torch.from_numpy(chosen).repeat_interleave(unit, -1)[..., : keys.shape[2]] & table.valid().view(2, 2, 1, -1)
    logits = logits.masked_fill(~read, -torch.inf)
    want = logits.softmax(-1).nan_to_num(0.0) @ torch.where(table.valid().view(2, 2, -1, 1), values, 0.0)
    for way, (out, lse) in found.items():
        assert out.dtype == dtype and lse.dtype == torch.float32, way
        near(out, want, dtype)
        assert_close(lse, logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
    assert handed_on.count("attend_units") == 0 and not read[0, 0].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scattered", "kind"), [(True, torch.int64), (False, torch.int32)])
@pytest.mark.parametrize(("heads", "narrow"), [("each", True), ("max", False)])
def test_a_step_is_its_parts_one_after_another(dtype, scattered, kind, heads, narrow, handed_on):  # noqa: F811  (a fixture)
    """A token is written, bounds rise, units are chosen, those are read; pages come when they are full."""
    ways = {}
    for way in ("cpu", "naive", "parts"):
        torch.manual_seed(1)
        pool = PagePool(
            {"keys": Plane(16, dtype), "values": Plane(24, dtype), "position": Plane(None, torch.int32)},
            torch.device("cpu"), 4,
        )  # fmt: skip
        table, bits = (
            PageTable(pool, 4, scattered=scattered),
            torch.bfloat16 if narrow and dtype.itemsize == 4 else dtype,
        )
        held = torch.full((2, 2, 9, 32), -torch.inf, dtype=bits)
        said = []
        for place in range(35):
            q = torch.randn(2, 2, 3, 16).to(dtype)
            planes = {"keys": torch.randn(4, 1, 16).to(dtype), "values": torch.randn(4, 1, 24).to(dtype)}
            planes["position"] = torch.tensor([[place]], dtype=kind).expand(4, 1)  # as one row of a model has it
            terms = {"unit": 4, "heads": heads, "sinks": 1, "recent": 1}
            with dispatch.use("cpu" if way == "parts" else way):
                if way == "parts":
                    ops.append_pages(table, planes, None)
                    ops.raise_bounds(
                        held, planes["keys"].view(2, 2, 1, 16), torch.ones(2, 2, 1, dtype=torch.bool),
                        np.full((2, 2), place), 4,
                    )  # fmt: skip
                    said.append(ops.attend_units(q, held, table, np.array([4, 3]), 0.3, **terms))
                else:
                    said.append(ops.step_units(q, table, planes, held, np.array([4, 3]), 0.3, **terms))
        dense = [table.dense(name) for name in ("keys", "values", "position")]
        ways[way] = [*dense, held, *(torch.stack(each) for each in zip(*said, strict=True))]
    for one, two in zip(ways["cpu"], ways["parts"], strict=True):
        assert torch.equal(one, two)
    for one, two in zip(ways["cpu"], ways["naive"], strict=True):
        near(one, two, dtype)
    assert "step_units" not in handed_on and "attend_units" not in handed_on


def test_what_is_read_at_once_must_fit():
    q, held, room = np.zeros((2, 3, 8), np.float32), np.zeros((2, 5, 16), np.float32), np.array([2, 2])
    keys, table, lengths = np.zeros((40, 8), np.float32), np.arange(10, dtype=np.int32).reshape(2, 5), [20, 17]
    out, lse = np.zeros((2, 3, 8), np.float32), np.zeros((2, 3), np.float32)

    def attend(q=q, held=held, table=table, lengths=lengths, page=4, each=1, heads="max"):
        counts = np.array(lengths, dtype=np.int32)
        _cpu.attend_units(q, held, room, heads, 0, 0, keys, keys, None, table, counts, page, each, 0.3, 1, out, lse)

    attend()
    for options, match in [
        ({"lengths": [21, 1]}, "lengths go beyond the table"),
        ({"held": held[:, :4].copy()}, "lengths go beyond held"),
        ({"table": table + 1}, "names a page that the pool does not have"),
        ({"held": held[:, :, :8].copy()}, "shapes of q, held"),
        ({"held": held[:1].copy()}, "must have the same rows"),
        ({"each": 0}, "each at least 1"),
        ({"heads": "all"}, "heads must be"),
    ]:
        with pytest.raises(ValueError, match=match):
            attend(**options)
    new, place, plane = np.zeros((2, 1, 8), np.float32), np.zeros((2, 1, 1), np.int32), np.zeros((40, 1), np.int32)

    def step(k=new, lengths=lengths, table=table, held=held):
        counts = np.array(lengths, dtype=np.int32)
        _cpu.step_units(
            q, k, new, place, held, room, "max", 0, 0, keys, keys.copy(), plane, table, counts, 4, 1, 0.3, 1, out, lse
        )

    step()
    for options, match in [
        ({"lengths": [20, 0]}, "beyond the table or held"),
        ({"lengths": [21, 1]}, "beyond the table or held"),
        ({"table": table + 1}, "names a page that the pool does not have"),
        ({"k": np.zeros((2, 2, 8), np.float32)}, "one token each"),
        ({"k": new.astype(np.int16)}, "shapes or dtypes"),
    ]:
        before = keys.copy(), held.copy()
        with pytest.raises(ValueError, match=match):
            step(**options)
        assert (keys == before[0]).all() and (held == before[1]).all()
