"""Keys of all KV heads together as a few numbers of a token, in bases of each row; some as they came (ShadowKV)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kvfold import ops
from kvfold.formats.chunks import chunk_means
from kvfold.formats.flat import Flat
from kvfold.formats.tokens import POSITION
from kvfold.pages import PageTable
from kvfold.rotation import Rope

LATENT, PIECE = "latent", "piece"
"""Planes of a row's tokens: their numbers, and in which of the row's bases those are."""
BASES, EXACT, EXACT_AT = "bases", "exact", "exact_at"
JOINT = (LATENT, PIECE, BASES, EXACT, EXACT_AT)
"""What a state has of keys."""
NOWHERE = torch.iinfo(torch.int32).max
"""The slot of an exact key that is none."""
MOST_PIECES = 255


class JointKeys:
    """`table` has a row for each sequence: all heads hold the same tokens.

    `bases` (B, P, H, D, r): pieces of a text, P at most, have bases of their own. Keys of slots `exact_at` (B, H, E),
    ascending, are held as they came: `exact` (B, H, E, D).
    """

    def __init__(
        self, table: PageTable, rope: Rope | None, bases: Float[Tensor, "B P H D R"], exact: Float[Tensor, "B H E D"],
        exact_at: Int[Tensor, "B H E"],
    ):  # fmt: skip
        self.table, self.rope, self.bases, self.exact, self.exact_at = table, rope, bases, exact, exact_at

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Numbers of a token, for all heads."""
        return self.bases.shape[-1]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.exact.shape[1]

    @property
    def beside(self) -> int:
        """Bytes of all but pages."""
        return self.bases.nbytes + self.exact.nbytes + self.exact_at.nbytes

    def more_bytes(self, more: Int[np.ndarray, " B"], apart: Int[np.ndarray, " B"]) -> int:
        """Bytes of `more` tokens of each row, a piece of its own, of which `apart[b]` keys of a head are exact."""
        rows, table = len(more), self.table
        wider = int((-(-(table.lengths + more) // table.pool.page_size)).max(initial=0)) - table.table.shape[1]
        pages = table.pages_for(more) * table.pool.page_nbytes + max(0, wider) * rows * table.table.itemsize
        pieces = int((self.pieces() + (more > 0)).max(initial=0)) - self.bases.shape[1]
        basis = int(np.prod(self.bases.shape[2:])) * self.bases.itemsize
        known = (self.exact_at < NOWHERE).sum(-1).amax(-1).cpu().numpy()
        keys = int((known + apart).max(initial=0)) - self.exact.shape[2]
        each = self.exact.shape[-1] * self.exact.itemsize + self.exact_at.itemsize
        total: int = pages + rows * (max(0, pieces) * basis + max(0, keys) * self.heads * each)
        return total

    def row_nbytes(self) -> Int[np.ndarray, " B"]:
        """Bytes of each row's part."""
        pages: np.ndarray = (self.table.table >= 0).sum(1) * self.table.pool.page_nbytes
        return pages + self.beside // max(1, len(self.bases))

    def pieces(self) -> Int[np.ndarray, " B"]:
        """Bases of each row."""
        found, held = np.zeros(self.table.rows, dtype=np.int64), self.table.lengths > 0
        if held.any():
            rows = held.nonzero()[0]
            last = self.table.read((PIECE,), rows, self.table.lengths[rows] - 1)[PIECE]
            found[rows] = last.cpu().numpy().astype(np.int64) + 1
        return found

    # -- writing -----------------------------------------------------------------------------------------------

    def fold(self, tokens: Flat, unit: int, outliers: int) -> None:
        """Keys in the model's numbers, at positions: those of each row, head by head, become a piece of it.

        A row's begin where a chunk of `unit` does, and are whole chunks. Of each head the keys of the `outliers` chunks
        whose keys are least like their mean stay as they are.
        """
        counts, start = tokens.counts.reshape(-1, self.heads)[:, 0], self.table.lengths
        ends, pieces, kind = np.cumsum(tokens.counts), self.pieces(), self.bases.dtype
        width = max(self.bases.shape[1], int((pieces + (counts > 0)).max(initial=0)))
        bases = F.pad(self.bases, (0,) * 6 + (0, width - self.bases.shape[1]))
        latents, exact = list[Tensor](), list[tuple[Tensor, Tensor]]()
        for row, number in enumerate(counts.tolist()):
            first = int(ends[row * self.heads]) - number
            mine, shape = slice(first, first + number * self.heads), (1, self.heads, number)
            keys = tokens.planes["keys"][mine].view(*shape, self.exact.shape[-1])
            exact.append(self._outliers(keys, unit, outliers, int(start[row])))
            if number:
                plain = self.turned(keys.float(), -tokens.planes[POSITION][mine].view(shape))
                codes, basis = low_rank(plain[0].transpose(0, 1).flatten(1), self.rank)
                bases[row, pieces[row]] = basis.view(bases.shape[2:]).to(kind)
                latents.append(codes.to(kind))
        if not latents:
            return
        which = np.repeat(pieces, counts).astype(np.uint8)
        self.table.add(counts, {LATENT: torch.cat(latents), PIECE: torch.from_numpy(which).to(bases.device)})
        self.bases = bases
        self._put_exact(exact)

    def _outliers(
        self, keys: Float[Tensor, "1 H N D"], unit: int, outliers: int, start: int
    ) -> tuple[Float[Tensor, "H E D"], Int[Tensor, "H E"]]:
        """Of a row's new keys those that are held as they are, and their slots, from `start` on."""
        _, alike = chunk_means(keys, unit)
        number = min(outliers, alike.shape[-1])
        odd = ops.top_mask(-alike.float(), torch.full((1, self.heads), number, dtype=torch.int64, device=keys.device))[
            0
        ]
        at = odd.nonzero()[:, 1].view(self.heads, number)
        at = (at[..., None] * unit + torch.arange(unit, device=keys.device)).flatten(1)
        return keys[0].gather(1, at[..., None].expand(-1, -1, keys.shape[-1])), (at + start).to(torch.int32)

    def _put_exact(self, found: Sequence[tuple[Tensor, Tensor]]) -> None:
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

    def truncate(self, counts: Int[np.ndarray, " B"], *, slack: bool) -> None:
        """Of each row so many tokens stay, and what belongs to them."""
        self.table.cut(counts)
        self.table.trim(slack=slack)
        gone = self.exact_at >= torch.from_numpy(counts).to(self.exact_at.device)[:, None, None]
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

    def of_slots(self, positions: Int[Tensor, "B H N"], start: int, stop: int | None) -> Float[Tensor, "B H N D"]:
        """Keys of slots `start` to `stop` of all rows, float32."""
        latent, piece = (self.table.dense(name, start, stop)[:, None] for name in (LATENT, PIECE))
        slots = torch.arange(start, start + positions.shape[-1], device=positions.device).expand_as(positions)
        return self.rebuilt(latent, piece, slots, positions)

    # -- rows --------------------------------------------------------------------------------------------------

    def select(self, rows: np.ndarray) -> "JointKeys":
        """Those of some sequences; pages are shared until written."""
        at = torch.from_numpy(np.asarray(rows)).to(self.bases.device)
        beside = (x[at] for x in (self.bases, self.exact, self.exact_at))
        return JointKeys(self.table.select(np.asarray(rows)), self.rope, *beside)

    def join(self, other: "JointKeys") -> None:
        """Take another's rows behind ours."""
        self.table.join(other.table)
        most = max(self.bases.shape[1], other.bases.shape[1])
        self.bases = torch.cat([F.pad(x.bases, (0,) * 6 + (0, most - x.bases.shape[1])) for x in (self, other)])
        most = max(self.exact.shape[2], other.exact.shape[2])
        self.exact = torch.cat([F.pad(x.exact, (0, 0, 0, most - x.exact.shape[2])) for x in (self, other)])
        at = [F.pad(x.exact_at, (0, most - x.exact_at.shape[2]), value=NOWHERE) for x in (self, other)]
        self.exact_at = torch.cat(at)

    def clear(self) -> None:
        """Drop everything."""
        self.table.restart()
        self.bases, self.exact = self.bases[:, :0].clone(), self.exact[:, :, :0].clone()
        self.exact_at = self.exact_at[..., :0].clone()

    def state(self) -> dict[str, Tensor]:
        """What it holds, for a file."""
        return {**self.table.flat(), BASES: self.bases, EXACT: self.exact, EXACT_AT: self.exact_at}

    def refill(self, counts: Int[np.ndarray, " B"], tensors: Mapping[str, Tensor]) -> None:
        """What `state` gave and somebody has looked at; it is empty."""
        device = self.bases.device
        self.table.add(counts, {name: tensors[name].to(device) for name in (LATENT, PIECE)})
        self.bases, self.exact, self.exact_at = (tensors[name].to(device).clone() for name in (BASES, EXACT, EXACT_AT))


def low_rank(states: Float[Tensor, "T N"], rank: int) -> tuple[Float[Tensor, "T R"], Float[Tensor, "N R"]]:
    """Numbers (float64) and the orthonormal basis whose product is nearest to `states` of all of this rank.

    By the eigenvectors of N x N products in float64; their signs have no say in what is made of both.
    """
    wide = states.double()
    _, vectors = torch.linalg.eigh(wide.mT @ wide)
    basis = vectors[:, -rank:].flip(-1)
    return wide @ basis, basis
