"""Each key as the nearest of a few vectors, part by part, that are fitted to the row's own keys (PQCache)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.ops.units.naive import behind
from kvfold.options import check_int
from kvfold.selectors.clusters import drawn, kmeans, nearest
from kvfold.selectors.held import HELD, HeldUnits, check_held, ends, nothing

BOOKS, LEARNED = "books", "learned"
"""What its tensors are called in a state, beside the codes."""
MOST_PARTS = 256
"""No key has more numbers than a few times that."""


@dataclass(frozen=True)
class Products:
    """Of each key, in `parts` equal parts, which of 2^`bits` vectors each part is nearest to; a byte a part.

    The vectors are k-means centres (Euclid) of a row's and head's own keys behind the first `sinks`, as they attend, of
    one random start: `seed`, layer, head and part say which keys it starts from, so that a row gets what it gets alone.
    They are fitted when a query of that row first has to choose, and hold from then on. A query's products with all of
    them make a table, and a token is worth the sum of its parts' entries. Codes are a `parts` / (4 D) of a cache's
    bytes in 16 bits; the vectors take as much as the keys of 2^`bits` tokens.
    """

    parts: int = 2
    bits: int = 6
    sinks: int = 32
    iterations: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("parts", self.parts, 1, high=MOST_PARTS)
        check_int("bits", self.bits, 1, high=8)
        check_int("sinks", self.sinks, 0)
        check_int("iterations", self.iterations, 1)
        check_int("seed", self.seed, 0, high=2**63 - 1)

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return 1

    @property
    def entries(self) -> int:
        """Vectors of a part."""
        return 1 << self.bits

    @property
    def enough(self) -> int:
        """Behind the sinks more keys than vectors, and the newest, which nothing is fitted to."""
        return self.sinks + self.entries + 2

    def open(self, spec: Spec) -> "ProductsOf":
        """Raises ValueError where a key has no such number of equal parts."""
        if spec.key_size % self.parts:
            raise ValueError(f"parts={self.parts} of a key must be equal, and layer {spec.layer} has {spec.key_size}")
        shape, dtype = self._books(spec)
        books = torch.zeros(shape, dtype=dtype, device=spec.device)
        learned = np.zeros((spec.rows, spec.heads), dtype=np.int64)
        return ProductsOf(self, spec, nothing(spec, self.parts, torch.uint8), books, learned)

    def _books(self, spec: Spec) -> tuple[tuple[int, ...], torch.dtype]:
        size = spec.key_size // self.parts
        return (spec.rows, spec.heads, self.parts, self.entries, size), spec.dtype

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        beside = {BOOKS: self._books(spec), LEARNED: ((spec.rows, spec.heads), torch.int64)}
        check_held(spec, tensors, counts, 1, self.parts, torch.uint8, **beside)
        codes, learned = tensors[HELD], tensors[LEARNED]
        most = int(codes.max()) if codes.numel() else 0
        if most >= self.entries or bool((learned < 0).any()):
            raise ValueError(f"index has code {most} of {self.entries}, or was fitted to {learned.tolist()} tokens")

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "ProductsOf":
        codes, books = (tensors[name].to(spec.device).clone() for name in (HELD, BOOKS))
        return ProductsOf(self, spec, codes, books, tensors[LEARNED].cpu().numpy().copy())


class ProductsOf(HeldUnits):
    """`held` (B, H, N, M): a code of each part of a key, 0 before anything is fitted; `books` (B, H, M, K, D / M).

    `learned` (B, H): up to which text position keys were fitted to; 0: no vector is known.
    """

    recipe: Products

    def __init__(
        self, recipe: Products, spec: Spec, held: UInt8[Tensor, "B H N M"], books: Float[Tensor, "B H M K E"],
        learned: Int[np.ndarray, "B H"],
    ):  # fmt: skip
        super().__init__(recipe, spec, held)
        self.books, self.learned = books, learned

    @property
    def beside_nbytes(self) -> int:
        """See `HeldUnits.beside_nbytes`: what was fitted."""
        return self.books.nbytes + self.learned.nbytes

    def learn(self, tokens: Callable[[], Chunk], which: Bool[np.ndarray, "B H"]) -> None:
        """See `Remembered.learn`. A row and head at a time: sums are the same whoever else is in the batch."""
        new = which & (self.learned == 0)
        if not new.any():
            return
        found, recipe = tokens(), self.recipe
        for row, head in np.argwhere(new).tolist():
            valid = found.valid[row, head]
            keys, places = found.keys[row, head, valid], found.positions[row, head, valid]
            points = self._split(keys[recipe.sinks : -1]).transpose(0, 1).contiguous()  # M N E
            start = [
                drawn(points.shape[1], recipe.entries, recipe.seed, self.spec.layer, head, part)
                for part in range(recipe.parts)
            ]
            first = torch.stack(start).to(points.device)
            self.books[row, head] = kmeans(points, first, recipe.iterations).to(self.books.dtype)
            self.learned[row, head] = int(places[:-1].max()) + 1
            self.held[row, head, : len(keys)] = self._codes(keys[None, None], self.books[row, head][None, None])[0, 0]

    def unlearn(self, limit: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.unlearn`."""
        gone = self.learned > limit
        if gone.any():
            which = torch.from_numpy(gone).to(self.held.device)
            self.learned = np.where(gone, 0, self.learned)
            self.books.masked_fill_(which[..., None, None, None], 0)
            self.held.masked_fill_(which[..., None, None], 0)

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`; where nothing is fitted yet a key is looked at then."""
        valid, known = tokens.valid, torch.from_numpy(self.learned > 0).to(tokens.valid.device)
        if not bool(valid.any()):
            return
        self.reach(ends(valid, start))
        valid = valid & known[..., None]
        if bool(valid.any()):
            self.put(valid, start, self._codes(tokens.keys, self.books))

    def _split(self, keys: Float[Tensor, "*N D"]) -> Float[Tensor, "*N M E"]:
        return keys.float().view(*keys.shape[:-1], self.recipe.parts, -1)

    def _codes(self, keys: Float[Tensor, "B H T D"], books: Float[Tensor, "B H M K E"]) -> UInt8[Tensor, "B H T M"]:
        which, _ = nearest(self._split(keys).transpose(2, 3), books.float())
        return which.mT.to(torch.uint8)

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`: q . k of the keys that codes stand for; not divided by sqrt(D)."""
        table = torch.einsum("bhgme,bhmke->mbhgk", self._split(asked), self.books.float())
        codes = self.held[:, :, : int(units.max(initial=0))].permute(3, 0, 1, 2)[:, :, :, None].long()  # M B H 1 N
        worth = sum(some.gather(-1, each.expand(*some.shape[:-1], -1)) for some, each in zip(table, codes, strict=True))
        assert isinstance(worth, Tensor)  # a key has a part
        return behind(worth, units)

    def select(self, rows: np.ndarray) -> "ProductsOf":
        """See `Remembered.select`."""
        at = np.asarray(rows)
        here = torch.from_numpy(at).to(self.held.device)
        spec = replace(self.spec, rows=len(at))
        return ProductsOf(self.recipe, spec, self.held[here], self.books[here], self.learned[at])

    def join(self, other: Any) -> None:
        """See `Remembered.join`."""
        super().join(other)
        self.books = torch.cat([self.books, other.books])
        self.learned = np.concatenate([self.learned, other.learned])

    def clear(self) -> None:
        super().clear()
        self.unlearn(np.full_like(self.learned, -1))

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), BOOKS: self.books, LEARNED: torch.from_numpy(self.learned)}


register("products", Products)
