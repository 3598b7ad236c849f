"""One forward pass as a layer sees it, and a point in a layer's life to go back to."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.views import Images, Queries
from kvfold.views.decisions import Propagate

DEFERRED = ("after_prefill", "after_decode", "after_layer", "after_forward")
"""Events that wait while assisted decoding may still take tokens back."""


@dataclass(frozen=True)
class Narrow:
    """From layer `after` on, a pass goes on with some of its tokens only (`Propagate`)."""

    after: int
    """The last layer of the model that sees all of them."""
    columns: Int[Tensor, "B N"]
    """Which of the pass's columns go on, ascending in each row; what stands where `valid` is not does not matter."""
    valid: Bool[Tensor, "B N"]
    positions: Int[Tensor, "B N"]
    """Where they stand in the text."""
    counts: np.ndarray
    """Tokens of the whole pass in each row, (B,)."""
    width: int
    """Columns of the whole pass."""


@dataclass
class Pass:
    """One forward pass as a layer sees it."""

    prefill: bool
    listen: bool = True
    """Whether the method's events run (not during a tentative pass)."""
    defer: bool = False
    """Whether they wait for `settle` (assisted decoding: a crop is still to come)."""
    turn: bool = False
    """Whether what looks like a draft is a further prompt, if no crop comes."""
    before: np.ndarray | int = 0
    """Tokens that each row (B,) had read before it."""
    step: dict[str, Any] = field(default_factory=dict)
    token_ids: Int[Tensor, "B Q"] | None = None
    images: Images | None = None
    mask: Tensor | None = None
    """The padding mask (B, W) over all columns read so far; None: no padding."""
    greedy: Int[Tensor, "B K"] | None = None
    """What the model would say after each of the pass's last K columns; set when a prompt's pass is over."""
    narrow: Narrow | None = None
    observe: Any = None
    """Called with each layer's view, before any decision."""

    def cropped(self, columns: int) -> "Pass":
        """The same pass without its last columns."""
        if not columns:
            return self
        taken = (self.token_ids, self.mask, self.greedy)
        ids, mask, greedy = (None if x is None else x[:, : x.shape[1] - columns] for x in taken)
        return replace(self, token_ids=ids, mask=mask, greedy=greedy)


def narrowed(wanted: Propagate, queries: Queries, layer: int) -> Narrow:
    """What `Propagate` at model layer `layer` says about a pass with these queries."""
    mask = wanted.mask & queries.valid
    mask |= queries.valid & (queries.valid.flip(1).cumsum(1).flip(1) == 1)  # each row's last
    number = max(1, int(mask.sum(1).max()))
    columns = torch.argsort(mask.byte(), dim=1, stable=True)[:, -number:]  # shorter rows are padded on the left
    valid, positions = mask.gather(1, columns), queries.positions.gather(1, columns)
    counts = queries.valid.sum(1).cpu().numpy().astype(np.int64)
    return Narrow(layer, columns, valid, positions, counts, mask.shape[1])


@dataclass(frozen=True)
class Mark:
    """A point in a layer's life to which it can be rewound."""

    seen: np.ndarray
    prompt: np.ndarray
    width: int
    counts: list[np.ndarray]
