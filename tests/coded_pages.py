"""Pages of codes for tests, and attention over them by its definition in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from kvfold.ops.codes.packing import pack, unpack, width
from kvfold.pages import PagePool, PageTable, Plane

RAGGED = [0, 1, 16, 37, 64, 70, 300, 5]
"""Tokens of rows: none, parts of pages, and several blocks."""


def scattered(
    planes: Mapping[str, Plane], lengths: list[int], page: int, states: Mapping[str, Tensor], *, poison: bool = True
) -> PageTable:
    """Tokens on pages in any order, with a position and a mass; behind a row's last is NaN or 255, where `poison`."""
    more = {"position": Plane(None, torch.int32), "log_mass": Plane(None, torch.float32)}
    table = PageTable(PagePool({**planes, **more}, torch.device("cpu"), page), len(lengths), scattered=True)
    ids = table.pool.allocate(sum(-(-length // page) for length in lengths) + 3)
    for i in torch.randperm(len(ids)).tolist():
        table.pool.release(ids[i : i + 1])
    for plane in table.pool.planes.values() if poison else ():
        plane.fill_(torch.nan if plane.dtype.is_floating_point else 255)
    table.add(np.array(lengths), {**states, "log_mass": torch.rand(sum(lengths)) * 3})
    return table


def refused(*args: Any, **options: Any) -> None:
    """In the place of a definition to which the CPU version must not hand its work on."""
    raise AssertionError("the kernel does not fit")


def with_extra(table: PageTable, extra: str) -> Tensor | None:
    """Rows of `RAGGED` with holes, or a read set of theirs; neither for other words."""
    if extra == "holes":
        holes = np.zeros((len(RAGGED), table.pool.page_size), dtype=np.int32)
        count = np.zeros(len(RAGGED), dtype=np.int32)
        for row, gone in ((1, [0]), (3, [0, 5, 36]), (6, [1, 64, 65, 299])):
            holes[row, : len(gone)], count[row] = gone, len(gone)
        table.holes, table.hole_count = holes, count
    if extra != "read":
        return None
    read = torch.rand(len(RAGGED), 1, table.longest) < 0.3
    read[3], read[6, 0, 64:192] = False, False
    return read


def table_of(lengths: list[int], bits: int, sizes: tuple[int, int, int], kind: torch.dtype, page: int) -> PageTable:
    """Random codes on scattered pages; what is behind a row's tokens has NaN for scales and zeros."""
    d, dv, channels = sizes
    by_page, by_token = Plane(d, kind, per_page=True), Plane(dv // channels, kind)
    planes = {
        "keys": Plane(width(d, bits), torch.uint8), "key_scale": by_page, "key_zero": by_page,
        "values": Plane(width(dv, bits), torch.uint8), "value_scale": by_token, "value_zero": by_token,
    }  # fmt: skip
    total, pages = sum(lengths), sum(-(-length // page) for length in lengths)
    states = {
        "keys": pack(torch.randint(0, 1 << bits, (total, d), dtype=torch.uint8), bits),
        "values": pack(torch.randint(0, 1 << bits, (total, dv), dtype=torch.uint8), bits),
        "key_scale": torch.rand(pages, d) / (1 << bits), "key_zero": torch.randn(pages, d) / 2,
        "value_scale": torch.rand(total, dv // channels) / (1 << bits),
        "value_zero": torch.randn(total, dv // channels),
    }  # fmt: skip
    return scattered(planes, lengths, page, states)


def softmax_over(
    q: Tensor, table: PageTable, scale: float, numbers: Callable[[int, np.ndarray], tuple[Tensor, Tensor]], mass: bool,
    read: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, weights) with torch.softmax in float64, row by row; `numbers`: keys and values at slots of a row."""
    outs, lses, lefts = [], [], []
    for row, length in enumerate(table.lengths.tolist()):
        slots = np.arange(length)
        seen = np.isin(slots, table.holes[row, : table.hole_count[row]], invert=True)
        seen &= np.ones(length, dtype=bool) if read is None else read.flatten(0, 1)[row, :length].numpy()
        at = slots[seen]
        keys, values = numbers(row, at)
        masses = table.read(("log_mass",), np.full(len(at), row), at)["log_mass"].double()
        logits = q.flatten(0, 1)[row, :, 0].double() @ keys.double().mT * scale + (masses if mass else 0)
        left = torch.zeros(q.shape[2], table.longest, dtype=torch.float64)
        left[:, torch.from_numpy(at)] = logits.softmax(-1)
        outs.append(logits.softmax(-1) @ values.double())
        lses.append(logits.logsumexp(-1))
        lefts.append(left)
    return torch.stack(outs), torch.stack(lses), torch.stack(lefts)


def softmax(
    q: Tensor, table: PageTable, scale: float, bits: int, dv: int, mass: bool, read: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_over` the numbers that codes stand for."""

    def numbers(row: int, at: np.ndarray) -> tuple[Tensor, Tensor]:
        names = ("keys", "values", "value_scale", "value_zero")
        planes = {name: x.double() for name, x in table.read(names, np.full(len(at), row), at).items()}
        pages = torch.from_numpy(table.table[row, at // table.pool.page_size]).long()
        shared = [table.pool.planes[name][pages].double() for name in ("key_scale", "key_zero")]
        keys = unpack(planes["keys"].byte(), q.shape[-1], bits) * shared[0] + shared[1]
        run = dv // planes["value_scale"].shape[-1]
        values = unpack(planes["values"].byte(), dv, bits) * planes["value_scale"].repeat_interleave(run, -1)
        return keys, values + planes["value_zero"].repeat_interleave(run, -1)

    return softmax_over(q, table, scale, numbers, mass, read)


def agree_in_float64(got: tuple[Tensor, ...], want: tuple[Tensor, ...], off: float) -> None:
    """(out, lse, weights) of one query a head, (B, H, G, 1, ...), are float32 and `softmax_over`'s within `off`."""
    for name, mine, theirs in zip(("out", "lse", "weights"), got, want, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine.flatten(0, 1).squeeze(2 if name != "lse" else -1).double(), theirs, atol=off, rtol=off,
                     msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip


def agree_one_by_one(
    got: tuple[Tensor, ...], q: Tensor, alone: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> None:
    """(out, lse) of queries (1, H, G, Q, D) that were answered together is what each gets alone."""
    out, lse = got[:2]
    for g, n in np.ndindex(*q.shape[2:4]):
        want = alone(q[:, :, g : g + 1, n : n + 1].transpose(0, 1))
        assert_close(out[0, :, g, n].double(), want[0][:, 0], atol=2e-6, rtol=2e-6)
        assert_close(lse[0, :, g, n].double(), want[1][:, 0], atol=2e-6, rtol=2e-6)
