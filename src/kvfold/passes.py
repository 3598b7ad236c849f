"""One forward pass as a layer sees it, and a point in a layer's life to go back to."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor


@dataclass
class Pass:
    """One forward pass as a layer sees it."""

    prefill: bool
    listen: bool = True
    """Whether the method's events run (not during a tentative pass)."""
    defer: bool = False
    """Whether they wait for `settle` (assisted decoding: a crop is still to come)."""
    step: dict[str, Any] = field(default_factory=dict)
    token_ids: Int[Tensor, "B Q"] | None = None
    mask: Tensor | None = None
    """The padding mask (B, W) over all columns read so far; None: no padding."""
    observe: Any = None
    """Called with each layer's view, before any decision."""

    def cropped(self, columns: int) -> "Pass":
        """The same pass without its last columns."""
        if not columns:
            return self
        ids, mask = (None if x is None else x[:, : x.shape[1] - columns] for x in (self.token_ids, self.mask))
        return replace(self, token_ids=ids, mask=mask)


@dataclass(frozen=True)
class Mark:
    """A point in a layer's life to which it can be rewound."""

    seen: np.ndarray
    prompt: np.ndarray
    width: int
    counts: list[np.ndarray]
