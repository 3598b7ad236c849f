"""What was measured of a layer's keys before RoPE: a few vectors of each head, near in what queries make of them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.selectors.clusters import nearest


@dataclass(frozen=True, eq=False)
class Codebook:
    """`centres` C of z = k L, where L L' = H is the second moment of queries: A2ATS (arXiv:2502.12665).

    (k - c) H (k - c)' = |k L - c L|^2, so that the nearest centre is the one whose products with queries err least.
    """

    turn: Float[Tensor, "H D D"]
    """L, float32, lower triangular."""
    centres: Float[Tensor, "H K D"]
    """C, float16 or float32, in the space of z."""
    distance: int
    """How far behind all keys the queries stood that H is of, b."""

    @cached_property
    def vectors(self) -> Float[Tensor, "H K D"]:
        """C L^-1, what centres are as keys, float32."""
        solved: Tensor = torch.linalg.solve_triangular(
            self.turn.double(), self.centres.double(), upper=False, left=False
        )
        return solved.float()

    def to(self, device: torch.device) -> "Codebook":
        """The same there; itself where it is there already."""
        if self.turn.device == device:
            return self
        return Codebook(self.turn.to(device), self.centres.to(device), self.distance)

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.turn.nbytes + self.centres.nbytes + self.vectors.nbytes

    @cached_property
    def digest(self) -> str:
        """Of all that codes depend on: whoever reads them must have the codebook that they were made with."""
        found = hashlib.sha256(str(self.distance).encode())
        for part in (self.turn, self.centres):
            found.update(part.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def codes(self, keys: Float[Tensor, "B H T D"]) -> Int[Tensor, "B H T"]:
        """Which centre each key, before RoPE, is nearest to; worked out in float32."""
        b, h, t, d = keys.shape
        turned = (keys.float() @ self.turn).transpose(0, 1).reshape(h, b * t, d)
        which, _ = nearest(turned, self.centres.float())
        return which.view(h, b, t).transpose(0, 1)
