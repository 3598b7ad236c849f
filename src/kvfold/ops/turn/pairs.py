"""How rotary embeddings turn, in a form that kernels know."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True, eq=False)
class Pairs:
    """A rotation that turns pairs of channels, from `first` on, by `angles[i]` radians for each step.

    Pair i are channels i and half + i, or 2 i and 2 i + 1 where those are `neighbours` (Cohere, GLM).
    """

    angles: Float32[np.ndarray, " half"]
    first: int
    neighbours: bool = False


def pairs_of(rope: Any) -> Pairs | None:
    """How a `kvfold.rotation.Rope` turns, where it does so in pairs of channels and says how; else None."""
    pairs: Pairs | None = getattr(rope, "pairs", None)
    return pairs
