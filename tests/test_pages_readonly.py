"""A rule for the room of pages: the arrays of a page table are read-only, whatever was done to it.

Copies on a device are sent when an array is another one than before, so a write in place would never be noticed
(`PageTable.on_device`).
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvfold import ops
from kvfold.ops.dispatch import use
from kvfold.pages import PagePool, PageTable, Plane

ROWS, SIZE, WIDTH = 4, 4, 16
ARRAYS = ("table", "lengths", "holes", "hole_count")


def append(table: PageTable, count: int, valid: torch.Tensor | None = None) -> None:
    planes = {name: torch.randn(ROWS, count, WIDTH) for name in ("keys", "values")}
    ops.append_pages(table, planes, valid)


def drop(table: PageTable, every: int, slack: bool) -> None:
    mask = table.valid()
    mask[:, 1::every] = False
    ops.keep_pages(table, mask, {}, slack=slack)


def step(table: PageTable) -> None:
    planes = {name: torch.randn(ROWS, 1, WIDTH) for name in ("keys", "values")}
    ops.step_pages(torch.randn(1, ROWS, 2, 1, WIDTH), table, planes, 0.25)


def even() -> PageTable:
    planes = {name: Plane(WIDTH, torch.float32) for name in ("keys", "values")}
    table = PageTable(PagePool(planes, torch.device("cpu"), SIZE), ROWS)
    append(table, 11)
    return table


def ragged() -> PageTable:
    table = even()
    append(table, 9, torch.arange(9) < torch.tensor([0, 9, 2, 5])[:, None])
    return table


def holed() -> PageTable:
    """The naive kernels leave no holes, and may find some."""
    table = even()
    drop(table, 40, slack=True)
    assert table.holed
    return table


STATES = {"even": even, "ragged": ragged, "holed": holed}
OPERATIONS: dict[str, Callable[[PageTable], PageTable | object]] = {
    "nothing": lambda table: None,
    "append": lambda table: append(table, 6),
    "append where valid": lambda table: append(table, 3, torch.arange(3) < torch.tensor([0, 3, 2, 1])[:, None]),
    "keep": lambda table: drop(table, 3, slack=False),
    "keep with slack": lambda table: drop(table, 40, slack=True),
    "attend a step": step,
    "extend": lambda table: table.extend(1),
    "reserve": lambda table: table.reserve(),
    "step on the device": lambda table: table.step(),
    "slots": lambda table: table.slots(np.array([0, 5, 1, 2])),
    "tail": lambda table: table.tail(2),
    "cut": lambda table: table.cut(np.array([3, 0, 11, 8])),
    "cut and trim": lambda table: (table.cut(np.array([3, 0, 11, 8])), table.trim()),
    "fill holes": lambda table: table.fill_holes(),
    "relocate": lambda table: table.relocate(table.needed + 2),
    "compact": lambda table: (table.cut(np.array([1, 0, 1, 1])), table.compact()),
    "release": lambda table: table.release(),
    "restart": lambda table: table.restart(),
    "select": lambda table: table.select(np.array([2, 0, 2])),
    "fork": lambda table: table.fork(),
    "append to a fork": lambda table: append(table.fork(), 3),
    "append to what is forked": lambda table: (table.fork(), append(table, 3))[0],
    "keep of what is forked": lambda table: (table.fork(), drop(table, 3, slack=False))[0],
    "step of what is forked": lambda table: (table.fork(), step(table))[0],
}


@pytest.mark.parametrize("kernels", ["cpu", "naive"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_arrays_of_a_table_are_read_only(operation: str, state: str, kernels: str) -> None:
    table = STATES[state]()
    with use(kernels):
        other = OPERATIONS[operation](table)
    for each in (table, other) if isinstance(other, PageTable) else (table,):
        open_ = [name for name in ARRAYS if getattr(each, name).flags.writeable]
        assert not open_, f"{open_} can be changed in place"
