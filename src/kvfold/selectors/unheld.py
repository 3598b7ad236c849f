"""An index of nothing: what chooses by the keys themselves has it, and a token is a unit."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.selectors.held import HELD, HeldUnits, behind, check_held, nothing


@dataclass(frozen=True)
class Unheld:
    """Of each token no number, so that to it all are worth the same."""

    unit = 1
    enough = 0

    def open(self, spec: Spec) -> "UnheldOf":
        return UnheldOf(self, spec, nothing(spec, 0))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_held(spec, tensors, counts, 1, 0)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "UnheldOf":
        return UnheldOf(self, spec, tensors[HELD].to(spec.device).clone())


class UnheldOf(HeldUnits):
    """`held` (B, H, N, 0)."""

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        if tokens.valid.numel():
            self.reach(int((start + tokens.valid.sum(-1).cpu().numpy()).max()))

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`."""
        same = torch.zeros(*asked.shape[:3], int(units.max(initial=0)), dtype=torch.float32, device=asked.device)
        return behind(same, units)


register("unheld", Unheld)
