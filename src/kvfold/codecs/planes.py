"""Keys or values of one layer, coded: symbols by channel under tables of their own, maxima, and what stays as it is."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.codecs import coder
from kvfold.codecs.quantiser import dequantise, largest, maxima_of, quantise

ANCHOR_BINS = 256
"""Of a group's first token: 8 bits. All channels share a table, which would else be larger than what it codes."""
MOST_GROWTH = 64
"""Times the bytes of its code that a plane may have: what a file may ask to be allocated."""
PARTS = ("words", "tables", "maxima")


@dataclass(frozen=True, eq=False)
class PlaneCoding:
    """How a plane of `counts[b, h]` vectors of each row and head, row by row, is coded."""

    counts: np.ndarray
    """Tokens of each (row, head), (B, H)."""
    size: int
    """Numbers of a token, D: channels of a head."""
    dtype: torch.dtype
    bins: int
    joint: bool
    """Whether the heads of a token have one maximum; else each has its own."""
    group: int
    """Tokens under one anchor; 0: no anchors."""

    @property
    def nbytes(self) -> int:
        """Bytes of the plane itself."""
        return int(self.counts.sum()) * self.size * self.dtype.itemsize

    def joins(self, raw: Bool[Tensor, "N"]) -> bool:
        """Whether all heads of a row have as many tokens without those that `raw` marks: they can share maxima."""
        return _even(self._without(raw.nonzero()[:, 0].numpy()))

    def encode(self, x: Float[Tensor, "N D"], raw: Bool[Tensor, "N"]) -> dict[str, Tensor] | None:
        """The tensors of the plane's code; tokens that `raw` marks stay as they are.

        None where they are not worth it: a number is not finite, the code is larger than the plane, or so small a part
        of it that `decode` would not read it.
        """
        if not bool(x.isfinite().all()):
            return None
        at = raw.nonzero()[:, 0]
        counts = self._without(at.numpy())
        left, tensors = x[~raw], {"raw": x[raw], "raw_at": at.to(torch.int32)}
        places, heads, vectors = self._laid(counts)
        if self.group:
            first = places % self.group == 0
            anchors = self._encode(left[first], heads[first], vectors[first], ANCHOR_BINS, shared=True)
            tensors |= {f"anchors.{name}": tensor for name, tensor in anchors.items()}
            known = self._decode(anchors, heads[first], vectors[first], ANCHOR_BINS, shared=True)
            left = (left.double() - known.double()[np.cumsum(first) - 1])[~first].to(self.dtype)
            heads, vectors = heads[~first], vectors[~first]
        tensors |= self._encode(left, heads, vectors, self.bins)
        size = sum(tensor.nbytes for tensor in tensors.values())
        return tensors if size < self.nbytes <= MOST_GROWTH * size else None

    def decode(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "N D"]:
        """The plane. Raises ValueError, before it is allocated, where the tensors can't be its code."""
        wanted = {"raw", "raw_at", *PARTS, *(f"anchors.{name}" for name in PARTS if self.group)}
        if set(tensors) != wanted:
            raise ValueError(f"a code of {sorted(tensors)}, which must be {sorted(wanted)}")
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.nbytes > MOST_GROWTH * size:
            raise ValueError(f"{self.nbytes} bytes in a code of {size}, of which at most {MOST_GROWTH} times are read")
        raw, at = tensors["raw"], tensors["raw_at"]
        total = int(self.counts.sum())
        if tuple(raw.shape) != (len(at), self.size) or raw.dtype != self.dtype or at.dtype != torch.int32:
            raise ValueError(f"raw={(tuple(raw.shape), raw.dtype)} of {len(at)} tokens, {at.dtype}")
        known = at.long()
        if bool((known.diff() <= 0).any()) or (len(known) and not 0 <= int(known[0]) <= int(known[-1]) < total):
            raise ValueError(f"raw_at, which must be places of {total} tokens in order")
        counts = self._without(known.numpy())
        if self.joint and not _even(counts):
            raise ValueError("one maximum for heads of different lengths")
        places, heads, vectors = self._laid(counts)
        first = places % self.group == 0 if self.group else np.zeros(len(places), dtype=bool)
        left = self._decode(tensors, heads[~first], vectors[~first], self.bins)
        if self.group:
            parts = {name: tensors[f"anchors.{name}"] for name in PARTS}
            anchors, deltas = self._decode(parts, heads[first], vectors[first], ANCHOR_BINS, shared=True), left
            left = anchors[np.cumsum(first) - 1]
            left[~first] = (left[~first].double() + deltas.double()).to(self.dtype)
        whole = torch.empty(total, self.size, dtype=self.dtype)
        whole[known] = raw
        stays = torch.ones(total, dtype=torch.bool)
        stays[known] = False
        whole[stays] = left
        return whole

    def _without(self, at: np.ndarray) -> np.ndarray:
        """Tokens of each row and head beside those."""
        row = np.searchsorted(self.counts.reshape(-1).cumsum(), at, side="right")
        fewer: np.ndarray = self.counts - np.bincount(row, minlength=self.counts.size).reshape(self.counts.shape)
        return fewer

    def _laid(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each token its place in its row and head, its head, and the number of its maximum."""
        flat = counts.reshape(-1)
        places = np.arange(flat.sum()) - np.repeat(flat.cumsum() - flat, flat)
        heads = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), flat)
        if not self.joint:
            return places, heads, np.arange(flat.sum())
        before = counts[:, 0].cumsum() - counts[:, 0]
        return places, heads, np.repeat(np.repeat(before, counts.shape[1]), flat) + places

    def _encode(
        self, x: Tensor, heads: np.ndarray, vectors: np.ndarray, bins: int, *, shared: bool = False
    ) -> dict[str, Tensor]:
        numbers, vector = np.unique(vectors, return_inverse=True)
        of = torch.from_numpy(vector)
        maxima = maxima_of(x, of, len(numbers))
        symbols = quantise(x, maxima, of, bins).numpy()
        streams = [stream for head in self._by_head(heads) for stream in symbols[head].T]
        n = 2 * largest(bins) + 1
        counts = np.stack([np.bincount(stream, minlength=n) for stream in streams])
        tables = coder.table_of(counts.sum(0, keepdims=True) if shared else counts)[:, :-1]
        words = coder.encode(streams, tables.repeat(len(streams), axis=0) if shared else tables)
        return {
            "words": torch.from_numpy(words.view(np.int32)),
            "tables": torch.from_numpy(tables.astype(np.uint16).view(np.int16)),
            "maxima": maxima,
        }

    def _decode(
        self, parts: Mapping[str, Tensor], heads: np.ndarray, vectors: np.ndarray, bins: int, *, shared: bool = False
    ) -> Tensor:
        numbers, vector = np.unique(vectors, return_inverse=True)
        words, tables, maxima = (parts[name] for name in PARTS)
        shapes = [tuple(tensor.shape) for tensor in (tables, maxima)], words.dim()
        kinds = words.dtype, tables.dtype, maxima.dtype
        channels = self.counts.shape[1] * self.size
        wide = 1 if shared else channels, 2 * largest(bins) + 1
        if shapes != ([wide, (len(numbers),)], 1) or kinds != (torch.int32, torch.int16, self.dtype):
            raise ValueError(
                f"words, tables and maxima={shapes[0]} {kinds}, of {wide} tables and {len(numbers)} maxima"
            )
        if not bool((maxima.isfinite() & (maxima >= 0)).all()):
            raise ValueError("a maximum that is no number >= 0")
        tokens = self._by_head(heads)
        lengths = [len(head) for head in tokens for _ in range(self.size)]
        bounds = tables.numpy().view(np.uint16).astype(np.int64)
        streams = coder.decode(
            words.numpy().view(np.uint32), bounds.repeat(channels, axis=0) if shared else bounds, lengths
        )
        symbols = np.empty((len(heads), self.size), dtype=np.uint8)
        for number, head in enumerate(tokens):
            symbols[head] = np.stack(streams[number * self.size : (number + 1) * self.size], axis=1)
        return dequantise(torch.from_numpy(symbols), maxima, torch.from_numpy(vector), bins)

    def _by_head(self, heads: np.ndarray) -> list[np.ndarray]:
        """The tokens of each head, in order."""
        return [np.flatnonzero(heads == head) for head in range(self.counts.shape[1])]


def _even(counts: np.ndarray) -> bool:
    return bool((counts == counts[:, :1]).all())
