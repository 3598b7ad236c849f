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

    turn: Float[Tensor, "H D D"]
    """V, float16 or float32: its columns are the directions."""
    weight: Float[Tensor, "H D"]
    """W, float32, positive."""

    def to(self, device: torch.device) -> "KeyBasis":
        """The same there; itself where it is there already."""
        here = self.turn.device == device
        return self if here else KeyBasis(self.turn.to(device), self.weight.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.turn.nbytes + self.weight.nbytes

    @cached_property
    def digest(self) -> str:
        """Of both: whoever reads codes must have the one that they were made with."""
        found = hashlib.sha256()
        for part in (self.turn, self.weight):
            found.update(part.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def entered(self, keys: Float[Tensor, "*N H T D"]) -> Float[Tensor, "*N H T D"]:
        """W V' k, float64."""
        return (keys.double() @ self.turn.double()) * self.weight.double()[:, None]

    def asked(self, q: Float[Tensor, "B H G Q D"], rotation: Rotation) -> Float[Tensor, "B H G Q D"]:
        """R W^{-1} V' q, float32."""
        met = (q.float() @ self.turn.float()[:, None]) / self.weight[:, None, None]
        return met @ rotation.matrix(q.device, torch.float32).mT

    def back(self, codes: Float[Tensor, "B H T D"], rotation: Rotation) -> Float[Tensor, "B H T D"]:
        """Keys of what codes stand for, V W^{-1} R' y."""
        turned = codes @ rotation.matrix(codes.device, codes.dtype)
        return (turned / self.weight[:, None].to(codes.dtype)) @ self.turn.to(codes.dtype).mT
