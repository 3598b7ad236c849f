"""Attention over tokens in codes with a Triton kernel on CUDA, where it fits; the definition for the rest."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvfold.ops.cpu import FLOATS
from kvfold.ops.dispatch import register
from kvfold.ops.gpu import answers, attend_rows, fits
from kvfold.ops.tokens import naive
from kvfold.ops.tokens.coding import Coding


@register("attend_tokens", "triton", rank=20, fits=fits)
def attend_tokens(
    q: Tensor, table: Any, scale: float, *, keys: Coding, values: Coding,
    mass: str | None, read: Tensor | None, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    planes = table.pool.planes
    floats = all(planes[f"{kind}_scale"].dtype in FLOATS for kind in naive.KINDS.values())
    if not floats or not answers(q, table, mass, keys.size, values.size):
        return naive.attend_tokens(q, table, scale, keys=keys, values=values, mass=mass, read=read, weights=weights)
    from kvfold.ops.tokens import triton_kernels

    sides = {
        what: triton_kernels.Side(
            coding, planes[what], _levels(coding, q.device), planes[f"{naive.KINDS[what]}_scale"],
            planes[f"{naive.KINDS[what]}_zero"] if coding.levels is None else None,
        )
        for what, coding in (("keys", keys), ("values", values))
    }  # fmt: skip
    return attend_rows(
        triton_kernels.attend, q, table, scale, dv=values.size, mass=mass, read=read, weights=weights, **sides
    )


@cache
def _levels(coding: Coding, device: torch.device) -> Tensor | None:
    return None if coding.levels is None else torch.tensor(coding.levels, dtype=torch.float32, device=device)
