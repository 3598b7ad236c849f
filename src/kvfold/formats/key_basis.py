"""A basis of each head in which keys are coded: theirs goes in by a matrix, queries and what is read by its inverse."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyBasis:
    """Keys are held as R A k, with a matrix A of each head and a rotation R of the layer, and asked by R A^{-T} q."""

    into: Float[Tensor, "H D D"]
    """A, float32."""
    asks: Float[Tensor, "H D D"]
    """A^{-1} R', float32: a query times it meets codes, a code times its transpose is a key."""

    @classmethod
    def of(cls, into: Float[Tensor, "H D D"], rotation: Float[Tensor, "D D"]) -> "KeyBasis":
        """On the rotation's device; the inverse is worked out in float64. Raises ValueError where there is none."""
        into = into.float().to(rotation.device)
        asks, failed = torch.linalg.inv_ex(into.double())
        asks = (asks @ rotation.double().mT).float()
        if bool(failed.any()) or not bool(asks.isfinite().all()):
            raise ValueError(f"basis={tuple(into.shape)} of keys has no inverse")
        return cls(into.contiguous(), asks.contiguous())

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.into.nbytes + self.asks.nbytes

    @cached_property
    def digest(self) -> str:
        """Of A: whoever reads codes must have the one that they were made with."""
        return hashlib.sha256(self.into.cpu().numpy().tobytes()).hexdigest()[:16]

    def entered(self, keys: Float[Tensor, "*N H T D"]) -> Float[Tensor, "*N H T D"]:
        """A k, float64."""
        return keys.double() @ self.into.double().mT

    def asked(self, q: Float[Tensor, "B H G Q D"]) -> Float[Tensor, "B H G Q D"]:
        """R A^{-T} q, float32."""
        return q.float() @ self.asks[:, None]

    def back(self, codes: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T D"]:
        """Keys of what codes stand for, A^{-1} R' y."""
        return codes @ self.asks.mT
