"""A basis of each head in which keys are coded: they go in by a matrix, queries and what is read by its inverse."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.formats.gaussian import Rotation


@dataclass(frozen=True, eq=False)
class KeyBasis:
    """Keys are held as R W V' k and asked by R W^{-1} V' q: V orthogonal and W diagonal, of each head, R a rotation.

    One matrix serves both ways, so that it is all that a cache has to hold.
    """

    turn: Float[Tensor, "H D D"] | None
    """V, float16 or float32: its columns are the directions. None: the channels are, and there is nothing to hold."""
    weight: Float[Tensor, "H D"]
    """W, float32, positive."""

    def to(self, device: torch.device) -> "KeyBasis":
        """The same there; itself where it is there already."""
        if self.weight.device == device:
            return self
        return KeyBasis(None if self.turn is None else self.turn.to(device), self.weight.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.weight.nbytes + (0 if self.turn is None else self.turn.nbytes)

    @cached_property
    def digest(self) -> str:
        """Of both: whoever reads codes must have the one that they were made with."""
        found = hashlib.sha256()
        for part in (self.weight, self.turn):
            if part is not None:
                found.update(part.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def entered(self, keys: Float[Tensor, "*N H T D"]) -> Float[Tensor, "*N H T D"]:
        """W V' k, float64."""
        return self._along(keys.double()) * self.weight.double()[:, None]

    def asked(self, q: Float[Tensor, "B H G Q D"], rotation: Rotation) -> Float[Tensor, "B H G Q D"]:
        """R W^{-1} V' q, float32."""
        met = q.float() if self.turn is None else q.float() @ self.turn.float()[:, None]
        return (met / self.weight[:, None, None]) @ rotation.matrix(q.device, torch.float32).mT

    def back(self, codes: Float[Tensor, "B H T D"], rotation: Rotation) -> Float[Tensor, "B H T D"]:
        """Keys of what codes stand for, V W^{-1} R' y."""
        found = (codes @ rotation.matrix(codes.device, codes.dtype)) / self.weight[:, None].to(codes.dtype)
        return found if self.turn is None else found @ self.turn.to(codes.dtype).mT

    def _along(self, keys: Float[Tensor, "*N H T D"]) -> Float[Tensor, "*N H T D"]:
        return keys if self.turn is None else keys @ self.turn.to(keys.dtype)
