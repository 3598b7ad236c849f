"""Pages of codes for tests, and attention over them by its definition in float64."""

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.codes.packing import pack, unpack, width
from kvfold.pages import PagePool, PageTable, Plane


def table_of(lengths: list[int], bits: int, sizes: tuple[int, int, int], kind: torch.dtype, page: int) -> PageTable:
    """Random codes on scattered pages; what is behind a row's tokens has NaN for scales and zeros."""
    (d, dv, channels), rows = sizes, len(lengths)
    by_page, by_token = Plane(d, kind, per_page=True), Plane(dv // channels, kind)
    planes = {
        "keys": Plane(width(d, bits), torch.uint8), "key_scale": by_page, "key_zero": by_page,
        "values": Plane(width(dv, bits), torch.uint8), "value_scale": by_token, "value_zero": by_token,
        "position": Plane(None, torch.int32), "log_mass": Plane(None, torch.float32),
    }  # fmt: skip
    table = PageTable(PagePool(planes, torch.device("cpu"), page), rows, scattered=True)
    ids = table.pool.allocate(sum(-(-length // page) for length in lengths) + 3)
    for i in torch.randperm(len(ids)).tolist():
        table.pool.release(ids[i : i + 1])
    counts = np.array(lengths)
    total, pages = int(counts.sum()), int((-(-counts // page)).sum())
    states = {
        "keys": pack(torch.randint(0, 1 << bits, (total, d), dtype=torch.uint8), bits),
        "values": pack(torch.randint(0, 1 << bits, (total, dv), dtype=torch.uint8), bits),
        "key_scale": torch.rand(pages, d) / (1 << bits), "key_zero": torch.randn(pages, d) / 2,
        "value_scale": torch.rand(total, dv // channels) / (1 << bits),
        "value_zero": torch.randn(total, dv // channels), "log_mass": torch.rand(total) * 3,
    }  # fmt: skip
    for name, spec in planes.items():
        table.pool.planes[name].fill_(torch.nan if spec.dtype.is_floating_point else 255)
    table.add(counts, states)
    return table


def softmax(
    q: Tensor, table: PageTable, scale: float, bits: int, dv: int, mass: bool, read: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights) with torch.softmax in float64, row by row, over the numbers that codes stand for."""
    outs, lses, lefts = [], [], []
    for row, length in enumerate(table.lengths.tolist()):
        slots = np.arange(length)
        seen = np.isin(slots, table.holes[row, : table.hole_count[row]], invert=True)
        seen &= np.ones(length, dtype=bool) if read is None else read.flatten(0, 1)[row, :length].numpy()
        at = slots[seen]
        rows, page = np.full(len(at), row), table.pool.page_size
        names = ("keys", "values", "value_scale", "value_zero", "log_mass")
        planes = {name: x.double() for name, x in table.read(names, rows, at).items()}
        pages = torch.from_numpy(table.table[rows, at // page]).long()
        shared = [table.pool.planes[name][pages].double() for name in ("key_scale", "key_zero")]
        keys = unpack(planes["keys"].byte(), q.shape[-1], bits) * shared[0] + shared[1]
        run = dv // planes["value_scale"].shape[-1]
        values = unpack(planes["values"].byte(), dv, bits) * planes["value_scale"].repeat_interleave(run, -1)
        values = values + planes["value_zero"].repeat_interleave(run, -1)
        logits = q.flatten(0, 1)[row, :, 0].double() @ keys.mT * scale + (planes["log_mass"] if mass else 0)
        left = torch.zeros(q.shape[2], table.longest, dtype=torch.float64)
        left[:, torch.from_numpy(at)] = logits.softmax(-1)
        outs.append(logits.softmax(-1) @ values)
        lses.append(logits.logsumexp(-1))
        lefts.append(left)
    return torch.stack(outs), torch.stack(lses), torch.stack(lefts)
