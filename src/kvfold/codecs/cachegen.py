"""CacheGen: keys and values as symbols by channel, at several levels of quality (arXiv:2310.07240, SIGCOMM 2024)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.codecs.planes import PlaneCoding
from kvfold.options import check_choice, check_int

LEVELS = {1: ((16, 16, 12), (16, 12)), 2: ((32, 16, 16), (32, 16)), 3: ((32, 32, 32), (32, 32))}
"""Bins by level: of keys in each third of the layers, of values in the first sixteenth of them and in the others."""
FEW_LAYERS = 10
"""A model with fewer has the bins of the first layers everywhere."""


@dataclass(frozen=True)
class CacheGen:
    """Each token's keys (values) of a layer divided by their largest magnitude, in `bins` steps, and entropy-coded.

    symbol = round(x Q / m + Q), Q = bins // 2 - 1, m over all heads of a token (`per_head`: over one; 1/D more numbers
    each, and an outlier channel of one head costs the others nothing). Each channel of each layer has a table of how
    often its symbols come, in integers; what is decoded is the same on every machine, and has the same code when it is
    saved again (without anchors). `level` 3 keeps most, 1 least: bins by layer as in the paper's code, finer in early
    layers. `group`: the first of so many tokens is an anchor in 8 bits, the others are coded as what they differ from
    it by (the paper's text; its code, and the default, have no anchors).
    Differs from the paper: the `first` tokens of a text stay as they are (everything attends to them); tables come
    with the layer instead of being profiled for a model (so does the code's); all channels of a layer are one stream
    of rANS, not a stream each for 256 tokens; deltas are taken from the decoded anchor and have the level's bins
    (the paper's widths of 0.5, 1 and 1.5 are relative to a scale that is not said: reconstructed).
    Raises ValueError for options outside of what is allowed.
    """

    level: int = 2
    per_head: bool = False
    first: int = 4
    group: int = 0

    levels: ClassVar[tuple[int, ...]] = tuple(LEVELS)

    def __post_init__(self) -> None:
        check_int("level", self.level, 1, high=max(LEVELS))
        check_choice("per_head", self.per_head, (False, True))
        check_int("first", self.first, 0)
        check_int("group", self.group, 0)

    def bins(self, what: str, layer: int, layers: int) -> int:
        """Steps of "keys" or "values" in a layer of so many."""
        keys, values = LEVELS[self.level]
        if layers < FEW_LAYERS:
            return keys[0] if what == "keys" else values[0]
        if what == "keys":
            return keys[3 * layer // layers]
        return values[0 if 16 * layer < layers else 1]

    def encode(
        self, x: Float[Tensor, "N D"], counts: np.ndarray, raw: Bool[Tensor, "N"], bins: int
    ) -> tuple[PlaneCoding, dict[str, Tensor]] | None:
        """A plane of `counts` (B, H) tokens, row by row, as its code; None where it should be written as it is.

        Rows whose heads hold different numbers of tokens have a maximum for each head.
        """
        coding = PlaneCoding(counts, x.shape[1], x.dtype, bins, not self.per_head, self.group)
        if coding.joint and not coding.joins(raw):
            coding = replace(coding, joint=False)
        tensors = coding.encode(x.detach().to("cpu", copy=False).contiguous(), raw)
        return None if tensors is None else (coding, tensors)
