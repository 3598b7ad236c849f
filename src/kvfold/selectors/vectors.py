"""Each key before RoPE as one of a few vectors that were measured on the model, asked at one distance (A2ATS)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int, Int16, UInt8
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.ops.units.naive import behind
from kvfold.options import check_name, shown
from kvfold.selectors.codebook import Codebook
from kvfold.selectors.held import HELD, HeldUnits, before_rope, check_held, ends, from_behind, nothing

BOOK = "book"
"""What a state calls the digest of the codebook."""
MOST = 2**15
"""Vectors that 16 bits tell apart."""
SUPPOSED = 1024, 2048
"""Vectors of a codebook, and their distance, where nothing was measured and only sizes are asked for."""


@dataclass(frozen=True)
class Vectors:
    """Of each key which of a head's vectors it is nearest to, two bytes; and a query that stands behind all keys.

    `key` names the `Codebook` of the layer in `Spec.artefact`: windowed RoPE and query-aware vector quantisation of
    A2ATS (arXiv:2502.12665). It is counted once a segment, and no part of a row; files hold its digest alone.
    """

    key: str
    unit = 1
    enough = 0
    turns = True

    def __post_init__(self) -> None:
        check_name("key", self.key, "a text that is not empty")

    def book(self, spec: Spec) -> Codebook:
        """Raises ValueError where nobody has given what was measured, it is of another layer, or RoPE is not known."""
        if spec.rope is None:
            raise ValueError(f"index={self} needs the model's RoPE, and layer {spec.layer} has none that is known")
        found = spec.artefact.get(self.key)
        if not isinstance(found, Codebook):
            raise ValueError(f"key={shown(self.key)} of an index is not what was measured: {[*spec.artefact]}")
        shape, wanted = tuple(found.turn.shape), (spec.heads, spec.key_size, spec.key_size)
        if shape != wanted:
            raise ValueError(f"turn={shape} of a codebook does not fit layer {spec.layer}: it must be {wanted}")
        return found.to(spec.device)

    def supposed(self, spec: Spec) -> dict[str, Codebook]:
        """See `Supposing`: one of as many vectors as `kvfold calibrate` makes."""
        entries, distance = SUPPOSED
        turn = torch.eye(spec.key_size, dtype=torch.float32).expand(spec.heads, -1, -1).contiguous()
        return {
            self.key: Codebook(turn, torch.zeros(spec.heads, entries, spec.key_size, dtype=torch.float16), distance)
        }

    def open(self, spec: Spec) -> "VectorsOf":
        return VectorsOf(self, spec, nothing(spec, 1, torch.int16), self.book(spec))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        book = self.book(spec)
        check_held(spec, tensors, counts, 1, 1, torch.int16, **{BOOK: ((8,), torch.uint8)})
        if not torch.equal(tensors[BOOK].cpu(), said(book)):
            raise ValueError(f"index has codes of another codebook than {shown(self.key)}, which was measured anew")
        codes, entries = tensors[HELD], book.centres.shape[1]
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < entries:
            raise ValueError(f"index has codes {int(codes.min())} to {int(codes.max())} of {entries}")

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "VectorsOf":
        return VectorsOf(self, spec, tensors[HELD].to(spec.device).clone(), self.book(spec))


class VectorsOf(HeldUnits):
    """`held` (B, H, N, 1): the number of a vector; 0 where no token has come."""

    recipe: Vectors

    def __init__(self, recipe: Vectors, spec: Spec, held: Int16[Tensor, "B H N 1"], book: Codebook):
        super().__init__(recipe, spec, held)
        self.book = book

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.book.nbytes

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`."""
        return super().nbytes_with(units) + self.book.nbytes

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        valid = tokens.valid
        if not bool(valid.any()):
            return
        self.reach(ends(valid, start))
        self.put(valid, start, self.book.codes(before_rope(self.spec, tokens))[..., None])

    def asks(self, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"]) -> Float[Tensor, "B H G D"]:
        """See `Remembered.asks`: as far behind all keys as the codebook says."""
        return from_behind(self.spec, q, seen, self.book.distance)

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not divided by sqrt(D)."""
        table = asked.float() @ self.book.vectors.mT  # B H G K
        codes = self.held[:, :, None, : int(units.max(initial=0)), 0].long()
        return behind(table.gather(-1, codes.expand(*table.shape[:3], -1)), units)

    def select(self, rows: np.ndarray) -> "VectorsOf":
        """See `Remembered.select`."""
        at = np.asarray(rows)
        held = self.held[torch.from_numpy(at).to(self.held.device)]
        return VectorsOf(self.recipe, replace(self.spec, rows=len(at)), held, self.book)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), BOOK: said(self.book)}


def said(book: Codebook) -> UInt8[Tensor, "8"]:
    """What a file has of a codebook."""
    return torch.tensor(list(bytes.fromhex(book.digest)), dtype=torch.uint8)


register("vectors", Vectors)
