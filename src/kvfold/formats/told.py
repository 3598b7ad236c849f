"""Numbers of each (row, head) that a segment is told beside its tokens: the first ones count, for good."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def first_told(
    name: str, held: Float[Tensor, "B H D"], told: Mapping[str, Tensor], which: Bool[Tensor, "B H"],
    counts: np.ndarray,
) -> Float[Tensor, "B H D"]:  # fmt: skip
    """What is held, and what is `told` by `name` of the rows and heads of `which` where that is nothing yet (zeros).

    A row and head without a token, `counts` (B, H), begins anew: what it was told goes with the last one.

    Raises ValueError where something else is told.
    """
    empty = torch.from_numpy(counts == 0).to(held.device)
    held = held.masked_fill((empty & which.to(held.device))[..., None], 0.0)
    if not told:
        return held
    strange = sorted(told.keys() - {name})
    if strange:
        raise ValueError(f"told={strange} must be {name!r}")
    new = told[name].to(held)
    return torch.where((held == 0).all(-1, keepdim=True) & which[..., None].to(held.device), new, held)


def settled(held: Float[Tensor, "B H D"]) -> Float[Tensor, "B H D"]:
    """What counts: 1 where nobody has told anything."""
    return held.masked_fill(held == 0, 1.0)


def check_told(name: str, held: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a state has such numbers, float32 (B, H, D), finite and no less than 0."""
    if held is None or tuple(held.shape) != shape or held.dtype != torch.float32:
        found = None if held is None else (tuple(held.shape), held.dtype)
        raise ValueError(f"{name}={found} must be {(shape, torch.float32)} (shape, dtype)")
    if not bool((held.isfinite() & (held >= 0)).all()):
        raise ValueError(f"{name} must be finite and no less than 0")
