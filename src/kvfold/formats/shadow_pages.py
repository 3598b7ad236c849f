"""Pages of tokens whose keys are a few numbers for all heads together, in bases of each row (ShadowKV)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kvfold import ops
from kvfold.formats.chunks import chunk_means
from kvfold.formats.flat import Flat
from kvfold.formats.paged import PagedSegment, refilled
from kvfold.formats.tokens import LOG_MASS, POSITION
from kvfold.ops.attend import blocked
from kvfold.ops.attend.blocked import Answer, Block, attend_blocks
from kvfold.pages import PagePool, PageTable
from kvfold.rotation import Compact, Rope

LATENT, PIECE = "latent", "piece"
"""Planes of a row's tokens: their numbers, and in which of the row's bases those are."""
BASES, EXACT, EXACT_AT = "bases", "exact", "exact_at"
BESIDE = (LATENT, PIECE, BASES, EXACT, EXACT_AT)
"""What a state has beside values and columns."""
NOWHERE = torch.iinfo(torch.int32).max
"""The slot of an exact key that is none."""
MOST_PIECES = 255


class ShadowPages(PagedSegment):
    """Values and columns of each (row, head), and what keys are made of in a table of its own, a row for each sequence.

    `bases` (B, P, H, D, r): pieces of a text, P at most, have bases of their own. Keys of slots `exact_at` (B, H, E),
    ascending, are held as they came: `exact` (B, H, E, D). All heads hold the same tokens.
    """

    codes = ("values",)

    def __init__(
        self, table: PageTable, latents: PageTable, heads: int, compute: torch.dtype, rope: Rope | None,
        bases: Float[Tensor, "B P H D R"], exact: Float[Tensor, "B H E D"], exact_at: Int[Tensor, "B H E"],
    ):  # fmt: skip
        super().__init__(table, heads, compute)
        self.latents, self.rope, self.bases, self.exact, self.exact_at = latents, rope, bases, exact, exact_at

    def like(self, table: PageTable, rows: np.ndarray) -> "ShadowPages":
        at = torch.from_numpy(rows).to(self.bases.device)
        beside = (x[at] for x in (self.bases, self.exact, self.exact_at))
        return ShadowPages(table, self.latents.select(rows), self.heads, self.compute, self.rope, *beside)

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Numbers of a token's keys, of all heads."""
        return self.bases.shape[-1]

    @property
    def _beside(self) -> int:
        return self.bases.nbytes + self.exact.nbytes + self.exact_at.nbytes

    def bytes_beside(self, counted: set[int]) -> int:
        return super().bytes_beside(counted) + self.latents.bytes_beside(counted) + self._beside

    def nbytes_after(self, more: Int[np.ndarray, "B H"], apart: Int[np.ndarray, " B"]) -> int:
        """`nbytes` with `more` tokens in each row, a piece of its own, of whose keys `apart[b]` of a head are exact."""
        rows, table, fresh = len(apart), self.latents, more[:, 0]
        wider = int((-(-(table.lengths + fresh) // table.pool.page_size)).max(initial=0)) - table.table.shape[1]
        latents = table.pages_for(fresh) * table.pool.page_nbytes + max(0, wider) * rows * table.table.itemsize
        pieces = int((self.pieces() + (fresh > 0)).max(initial=0)) - self.bases.shape[1]
        basis = int(np.prod(self.bases.shape[2:])) * self.bases.itemsize
        known = (self.exact_at[:, 0] < NOWHERE).sum(-1).cpu().numpy() if self.heads else np.zeros(rows, dtype=int)
        keys = int((known + apart).max(initial=0)) - self.exact.shape[2]
        each = self.exact.shape[-1] * self.exact.itemsize + self.exact_at.itemsize
        beside = rows * (max(0, pieces) * basis + max(0, keys) * self.heads * each)
        total: int = self.nbytes_with(more) + latents + beside
        return total

    def row_nbytes(self) -> np.ndarray:
        pages: np.ndarray = (self.latents.table >= 0).sum(1) * self.latents.pool.page_nbytes
        sizes: np.ndarray = super().row_nbytes() + pages + self._beside // max(1, self.batch)
        return sizes

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        return super().pages_for(more) | {self.latents.pool: self.latents.pages_for(more[:, 0])}

    def pieces(self) -> Int[np.ndarray, " B"]:
        """Bases of each row."""
        found, held = np.zeros(self.batch, dtype=np.int64), self.latents.lengths > 0
        if held.any():
            rows = held.nonzero()[0]
            last = self.latents.read((PIECE,), rows, self.latents.lengths[rows] - 1)[PIECE]
            found[rows] = last.cpu().numpy().astype(np.int64) + 1
        return found

    # -- writing -----------------------------------------------------------------------------------------------

    def fold(self, tokens: Flat, unit: int, outliers: int) -> None:
        """Tokens in the model's numbers, the same ones of all heads: those of each row become a piece of it.

        A row's begin where a chunk of `unit` does, and are whole chunks. Of each head the keys of the `outliers` chunks
        whose keys are least like their mean stay as they are.
        """
        counts, start = tokens.counts.reshape(-1, self.heads)[:, 0], self.counts()[:, 0]
        ends, pieces = np.cumsum(tokens.counts), self.pieces()
        width = max(self.bases.shape[1], int((pieces + (counts > 0)).max(initial=0)))
        bases = F.pad(self.bases, (0,) * 6 + (0, width - self.bases.shape[1]))
        latents, exact = list[Tensor](), list[tuple[Tensor, Tensor]]()
        for row in range(self.batch):
            number, first = int(counts[row]), int(ends[row * self.heads] - counts[row])
            mine = slice(first, first + number * self.heads)
            keys = tokens.planes["keys"][mine].view(1, self.heads, number, self.exact.shape[-1])
            exact.append(self._outliers(keys, unit, outliers, int(start[row])))
            if number:
                plain = self.turned(keys.float(), -tokens.planes[POSITION][mine].view(1, self.heads, number))
                codes, basis = low_rank(plain[0].transpose(0, 1).flatten(1), self.rank)
                bases[row, pieces[row]] = basis.view(bases.shape[2:]).to(bases.dtype)
                latents.append(codes.to(self.compute))
        if not latents:
            return
        which = np.repeat(pieces, counts).astype(np.uint8)
        planes = {LATENT: torch.cat(latents), PIECE: torch.from_numpy(which).to(bases.device)}
        columns = {name: plane for name, plane in tokens.planes.items() if name != "keys"}
        self.latents.add(counts, planes)
        self.table.add(tokens.counts, columns)
        self.bases = bases
        self._put_exact(exact)

    def _outliers(
        self, keys: Float[Tensor, "1 H N D"], unit: int, outliers: int, start: int
    ) -> tuple[Float[Tensor, "H E D"], Int[Tensor, "H E"]]:
        """Of a row's new keys those that are held as they are, and their slots, from `start` on."""
        _, alike = chunk_means(keys, unit)
        number = min(outliers, alike.shape[-1])
        odd = ops.top_mask(-alike.float(), torch.full((1, self.heads), number, device=keys.device))[0]
        at = odd.nonzero()[:, 1].view(self.heads, number)
        at = (at[..., None] * unit + torch.arange(unit, device=keys.device)).flatten(1)
        return keys[0].gather(1, at[..., None].expand(-1, -1, keys.shape[-1])), (at + start).to(torch.int32)

    def _put_exact(self, found: list[tuple[Tensor, Tensor]]) -> None:
        """Hold these keys of each row behind those that are held."""
        most = max(at.shape[1] for _, at in found)
        keys = torch.stack([F.pad(x, (0, 0, 0, most - x.shape[1])) for x, _ in found])
        at = torch.stack([F.pad(x, (0, most - x.shape[1]), value=NOWHERE) for _, x in found])
        self._set_exact(torch.cat([self.exact, keys.to(self.exact.dtype)], 2), torch.cat([self.exact_at, at], 2))

    def _set_exact(self, keys: Float[Tensor, "B H E D"], at: Int[Tensor, "B H E"]) -> None:
        order = at.argsort(dim=-1, stable=True)
        most = int((at < NOWHERE).sum(-1).max()) if at.numel() else 0
        order = order[..., :most]
        self.exact_at = at.gather(-1, order)
        self.exact = keys.gather(2, order[..., None].expand(*order.shape, keys.shape[-1]))

    def set_columns(self, columns: Mapping[str, Tensor]) -> None:
        """Set columns (B, H, T) on all tokens."""
        rows, slots = self.table.spans()
        at = tuple(torch.from_numpy(x).to(self.pool.device) for x in (rows, slots))
        planes = {name: column.flatten(0, 1)[at] for name, column in self.add_columns(columns).items()}
        if planes:
            self.table.write(rows, slots, planes)

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        """See `Segment.truncate`: of each row whole chunks stay."""
        super().truncate(counts, slack=slack)
        self.latents.cut(counts[:, 0])
        self.latents.trim(slack=slack)
        gone = self.exact_at >= torch.from_numpy(counts).to(self.exact_at.device)[..., None]
        if bool(gone.any()):
            self._set_exact(self.exact.masked_fill(gone[..., None], 0.0), self.exact_at.masked_fill(gone, NOWHERE))
        pieces = self.pieces()
        held = torch.arange(int(pieces.max(initial=0)), device=self.bases.device)
        there = held < torch.from_numpy(pieces).to(held.device)[:, None]
        self.bases = self.bases[:, : len(held)].masked_fill(~there[..., None, None, None], 0.0)

    # -- reading -----------------------------------------------------------------------------------------------

    def turned(self, keys: Float[Tensor, "B H T D"], steps: Int[Tensor, "B H T"]) -> Float[Tensor, "B H T D"]:
        """Keys rotated further; as they are where the layer's rotation is not known."""
        return keys if self.rope is None else self.rope.shift(keys, steps)

    def rebuilt(
        self, latent: Float[Tensor, "B X N R"], piece: UInt8[Tensor, "B X N"], slots: Int[Tensor, "B H N"],
        positions: Int[Tensor, "B H N"],
    ) -> Float[Tensor, "B H N D"]:  # fmt: skip
        """Keys of slots, rotated to their positions, float32; X is H, or 1 where all heads ask for the same."""
        made = None
        for number, basis in enumerate(self.bases.unbind(1)):
            some = latent.float() @ basis.float().mT
            made = some if made is None else torch.where((piece == number)[..., None], some, made)
        if made is None:
            made = self.exact.new_zeros(*slots.shape, self.exact.shape[-1], dtype=torch.float32)
        made = self.turned(made, positions)
        if not self.exact_at.shape[-1]:
            return made
        found = torch.searchsorted(self.exact_at, slots.to(torch.int32).contiguous())
        found = found.clamp(max=self.exact_at.shape[-1] - 1)
        exact = self.exact.gather(2, found[..., None].expand(*found.shape, made.shape[-1]))
        return torch.where((self.exact_at.gather(-1, found) == slots)[..., None], exact.float(), made)

    def keys(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "B H N D"]:
        """Keys of some slots of all rows, float32."""
        latent, piece = (self.latents.dense(name, start, stop)[:, None] for name in (LATENT, PIECE))
        positions = self.plane(POSITION, start, stop)
        slots = torch.arange(start, start + positions.shape[-1], device=positions.device).expand_as(positions)
        return self.rebuilt(latent, piece, slots, positions)

    def states(self, what: str) -> Tensor:
        if what == "values":
            return self.plane(what).to(self.compute)
        most = torch.finfo(self.compute).max  # which a number that was rounded and turned may exceed
        step = max(1, blocked.BLOCK_ELEMENTS // max(1, self.table.rows * self.exact.shape[-1]))
        ends = [*range(0, max(1, self.longest), step), self.longest]
        parts = [self.keys(*ends[i : i + 2]).clamp(-most, most).to(self.compute) for i in range(len(ends) - 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def listed_tokens(self, mask: Bool[Tensor, "B H T"]) -> tuple[dict[str, Tensor], Bool[Tensor, "B H N"]]:
        """Keys (float32), values and columns of the tokens that are marked, in order, and which slots have one.

        What it costs is theirs: no other is looked at.
        """
        row, head, slot = mask.nonzero(as_tuple=True)
        counts = mask.sum(-1)
        most = int(counts.max()) if mask.numel() else 0
        real = torch.arange(most, device=mask.device) < counts[..., None]
        rows, slots = (x.cpu().numpy() for x in (row * self.heads + head, slot))
        latents = self.latents.read((LATENT, PIECE), row.cpu().numpy(), slots)
        found = {**self.table.read(("values", *self.names().values()), rows, slots), **latents, "slot": slot}
        wide = {}
        for name, plane in found.items():
            wide[name] = plane.new_zeros(*real.shape, *plane.shape[1:])
            wide[name][real] = plane
        wide["keys"] = self.rebuilt(wide.pop(LATENT), wide.pop(PIECE), wide.pop("slot"), wide[POSITION])
        return wide, real

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> Answer:  # fmt: skip
        """Over keys that are rebuilt, a block at a time, or those alone that `read` marks."""
        mass = LOG_MASS if self.weighed else None
        if read is None or compact is not None or weights:

            def block(start: int, stop: int) -> Block:
                return Block(self.keys(start, stop), self.plane("values", start, stop))

            return attend_blocks(
                q, scale, self.valid(), self.pool.planes["values"].shape[-1], block, self.column, mass=mass, read=read,
                compact=compact, weights=weights,
            )  # fmt: skip
        some, real = self.listed_tokens(read & self.valid())
        bias = torch.zeros(real.shape, device=real.device) if mass is None else some[mass].float()
        bias = bias.masked_fill(~real, -torch.inf)[:, :, None]
        b, h, g, n, d = q.shape
        out, lse = ops.attend(q.reshape(b, h, g * n, d), some["keys"], some["values"], scale, bias)
        return out.reshape(b, h, g, n, -1).to(q.dtype), lse.reshape(b, h, g, n), None

    # -- rows and pages ----------------------------------------------------------------------------------------

    @property
    def tables(self) -> tuple[PageTable, PageTable]:
        """All that its tokens lie on."""
        return self.table, self.latents

    def join(self, other: Any) -> None:
        super().join(other)
        self.latents.join(other.latents)
        most = max(self.bases.shape[1], other.bases.shape[1])
        self.bases = torch.cat([F.pad(x.bases, (0,) * 6 + (0, most - x.bases.shape[1])) for x in (self, other)])
        most = max(self.exact.shape[2], other.exact.shape[2])
        exact = torch.cat([F.pad(x.exact, (0, 0, 0, most - x.exact.shape[2])) for x in (self, other)])
        at = [F.pad(x.exact_at, (0, most - x.exact_at.shape[2]), value=NOWHERE) for x in (self, other)]
        self.exact, self.exact_at = exact, torch.cat(at)

    def clear(self) -> None:
        super().clear()
        self.latents.restart()
        self.bases, self.exact = self.bases[:, :0].clone(), self.exact[:, :, :0].clone()
        self.exact_at = self.exact_at[..., :0].clone()

    def compact(self) -> None:
        for table in self.tables:
            table.compact()

    @property
    def shared(self) -> bool:
        return any(table.shared for table in self.tables)

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said, tensors = super().state(of=of)
        if of is not None:
            return said, tensors
        return said, {
            **tensors, **self.latents.flat(), BASES: self.bases, EXACT: self.exact, EXACT_AT: self.exact_at
        }  # fmt: skip

    def refill(self, counts: Int[np.ndarray, "B H"], tensors: Mapping[str, Tensor]) -> None:
        """What `state` gave and somebody has looked at; it is empty."""
        refilled(self, counts, {name: x for name, x in tensors.items() if name not in BESIDE})
        device = self.pool.device
        self.latents.add(counts[:, 0], {name: tensors[name].to(device) for name in (LATENT, PIECE)})
        self.bases, self.exact, self.exact_at = (tensors[name].to(device).clone() for name in (BASES, EXACT, EXACT_AT))


def low_rank(states: Float[Tensor, "T N"], rank: int) -> tuple[Float[Tensor, "T R"], Float[Tensor, "N R"]]:
    """Numbers (float64) and the orthonormal basis whose product is nearest to `states` of all of this rank.

    By the eigenvectors of N x N products in float64; their signs have no say in what is made of both.
    """
    wide = states.double()
    _, vectors = torch.linalg.eigh(wide.mT @ wide)
    basis = vectors[:, -rank:].flip(-1)
    return wide @ basis, basis
