"""Elite: a few rotated channels of each head's key, and one latent for all else (EliteKV, arXiv:2503.01586)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvfold.formats.by_token import ByToken, TokenSegment
from kvfold.formats.paged import check_paged, open_table, refilled, said_counts
from kvfold.formats.segment import Segment, Spec, Traits
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk, LateChunk
from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.options import check_int, shown
from kvfold.pages import PAGE_SIZE, PagePool, PageTable, Plane
from kvfold.rotation import Compact


@dataclass(frozen=True, eq=False)
class Basis:
    """What a layer's keys and values are held by. M = D - 2r + Dv of each head's numbers are in the latent."""

    elite: Bool[Tensor, "H D"]
    """The channels of each head's key that stay as they are, 2r of each."""
    latent: Float[Tensor, "N C"]
    """Orthonormal columns, float32; rows are heads, and of each the rest of its key, then its value."""

    @property
    def rank(self) -> int:
        """Numbers of the latent, C."""
        return self.latent.shape[1]

    @cached_property
    def at(self) -> Int[Tensor, "H E"]:
        """The elite channels of each head, ascending."""
        return self.elite.nonzero()[:, 1].clone().view(len(self.elite), -1)

    @cached_property
    def rest(self) -> Int[Tensor, "H R"]:
        """All others."""
        return (~self.elite).nonzero()[:, 1].clone().view(len(self.elite), -1)

    def maps(self) -> tuple[Float[Tensor, "H R C"], Float[Tensor, "H Dv C"]]:
        """What makes the rest of a head's key, and its value, of a latent."""
        each = self.latent.view(len(self.elite), -1, self.rank)
        return each[:, : self.rest.shape[1]], each[:, self.rest.shape[1] :]

    def fits(self, heads: int, key_size: int, value_size: int) -> bool:
        """Whether it is of such a layer."""
        counts = self.elite.sum(-1)
        if tuple(self.elite.shape) != (heads, key_size) or bool((counts != counts[0]).any()):
            return False
        wide = heads * (key_size - int(counts[0]) + value_size)
        return self.latent.dim() == 2 and len(self.latent) == wide and 1 <= self.rank <= wide

    def to(self, device: torch.device) -> "Basis":
        """The same there; itself where it is there already."""
        return self if self.elite.device == device else Basis(self.elite.to(device), self.latent.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of what it is, its indexes included."""
        return sum(x.nbytes for x in (self.elite, self.latent, self.at, self.rest))


@dataclass(frozen=True)
class Elite(ByToken):
    """For each token H * 2r + C numbers: the elite channels of all heads' keys, and a latent of all heads together.

    What comes is in the frame of EliteKV: keys and queries are rotated in their elite channels alone. The rest y of all
    heads' keys and values becomes z = y P, P (H (D - 2r + Dv), C) orthonormal, and is read as z P'. So a query attends
    over what lies there: its rest times P's rows of its head, once, is multiplied with latents, and what it gets of
    latents becomes a value once. No key or value is restored but for who asks to see them.
    `key` names what was measured for it in `Spec.artefact`, a `Basis`; the basis is counted once, and is not saved: who
    loads a cache must have it. All heads hold the same tokens; what differs between heads is refused before anything
    changes. Whole rows of tokens can be dropped, exact to crop.
    """

    key: str = ""
    page_size: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits(addressed="whole", frame="unrotated")

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1)

    def basis(self, spec: Spec) -> Basis:
        """What was measured for the layer. Raises ValueError where nobody has given it, or it is of another one."""
        found = spec.artefact.get(self.key)
        if not isinstance(found, Basis):
            raise ValueError(f"key={shown(self.key)} of an elite format is not what was measured: {[*spec.artefact]}")
        if not found.fits(spec.heads, spec.key_size, spec.value_size):
            shapes = tuple(found.elite.shape), tuple(found.latent.shape)
            raise ValueError(
                f"basis={shapes} (elite, latent) does not fit layer {spec.layer} of {spec.heads} heads, key size "
                f"{spec.key_size}, value size {spec.value_size}"
            )
        return found

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start."""
        basis = self.basis(spec)
        sizes = {"keys": Plane(basis.at.numel(), spec.dtype), "latent": Plane(basis.rank, spec.dtype)}
        return sizes | {POSITION: Plane(None, torch.int32)}

    def open(self, spec: Spec) -> "EliteSegment":
        basis = self.basis(spec)
        table = open_table(self, replace(spec, heads=1), self.planes(spec), self.page_size)
        return EliteSegment(table, spec.heads, spec.dtype, self, basis.to(spec.device))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        planes, one = self.planes(spec), self._joint(spec, said)
        check_paged(planes, self.page_size, replace(spec, heads=1), one, tensors, seen)

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "EliteSegment":
        if twin is None:
            self.check(spec, said, tensors)
        mine = twin if twin is None or isinstance(twin, EliteSegment) else None
        if twin is not None and (mine is None or not np.array_equal(mine.counts(), said_counts(spec, said))):
            raise ValueError(f"counts={said['counts']} must be those of the segment that holds the same pages")
        if mine is not None:
            return mine.select(np.arange(spec.rows))
        return refilled(self.open(spec), said_counts(spec, said)[:, 0], tensors)

    def _joint(self, spec: Spec, said: Mapping[str, Any]) -> dict[str, Any]:
        """What a state says, of all heads as one. Raises ValueError where they differ."""
        counts = said_counts(spec, said)
        if (counts != counts[:, :1]).any():
            raise ValueError(f"counts={shown(said['counts'])} must be the same for all heads of a row")
        return {**said, "counts": counts[:, :1].tolist()}


class EliteSegment(TokenSegment):
    """Tokens of all heads together, a row of the page table for each sequence."""

    codes = ("keys", "latent")

    def __init__(self, table: PageTable, kv_heads: int, compute: torch.dtype, form: Elite, basis: Basis):
        super().__init__(table, 1, compute)
        self.kv_heads, self.form, self.basis = kv_heads, form, basis

    def like(self, table: PageTable, rows: np.ndarray) -> "EliteSegment":
        return EliteSegment(table, self.kv_heads, self.compute, self.form, self.basis)

    # -- sizes, as if each head had tokens of its own --------------------------------------------------------------

    def bytes_beside(self, counted: set[int]) -> int:
        basis = 0 if id(self.basis) in counted else self.basis.nbytes
        counted.add(id(self.basis))
        return super().bytes_beside(counted) + basis

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        return super().pages_for(more.max(1))

    def counts(self) -> np.ndarray:
        return super().counts().repeat(self.kv_heads, 1)

    def lengths(self) -> np.ndarray:
        return super().lengths().repeat(self.kv_heads, 1)

    def columns(self) -> tuple[Bool[Tensor, "B H T"], Mapping[str, Tensor]]:
        valid, columns = super().columns()
        return self._each(valid), {name: self._each(column) for name, column in columns.items()}

    def dense(self) -> Chunk:
        valid, columns = self.columns()
        return LateChunk(lambda: self.states("keys"), lambda: self.states("values"), valid, columns)

    def _each(self, column: Shaped[Tensor, "B 1 T"]) -> Shaped[Tensor, "B H T"]:
        return column.expand(-1, self.kv_heads, -1)

    # -- tokens ----------------------------------------------------------------------------------------------------

    def encode(self, what: str, states: Tensor) -> dict[str, Tensor]:
        """The plane of the elite channels; of the latent see `append`, which needs keys and values at once."""
        raise NotImplementedError(f"{what}={tuple(states.shape)}: keys and values of all heads are coded together")

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """Raises ValueError, and changes nothing, where heads bring different tokens or columns."""
        valid = None if even else _joint("valid", chunk.valid)
        columns = {name: _joint(name, column) for name, column in chunk.columns.items()}
        keys, basis = chunk.keys, self.basis
        (b, h, t, _), at = keys.shape, basis.at[None, :, None].expand(*keys.shape[:3], -1)
        rest = torch.cat([keys.gather(-1, basis.rest[None, :, None].expand(b, h, t, -1)), chunk.values], -1)
        # In float64: the order in which float32 is summed depends on how many tokens come at once, and what is held
        # must not.
        latent = rest.transpose(1, 2).flatten(2)[:, None].double() @ basis.latent.double()
        elite = keys.gather(-1, at).transpose(1, 2).flatten(2)[:, None]
        planes = {"keys": elite, "latent": latent.to(self.compute)}
        self.add(planes | self.add_columns(columns), valid)

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        """Raises ValueError, and changes nothing, where heads would keep different tokens."""
        joint = {name: _joint(name, column) for name, column in columns.items()}
        super().keep(_joint("mask", mask), joint, slack=slack)

    def close(self) -> None:
        if self.table.holed:
            super().keep(self.valid(), {})

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        raise ValueError(f"slots={tuple(slots.shape)}: {self.form} holds tokens of all heads together, written once")

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        if (counts != counts[:, :1]).any():
            raise ValueError(f"counts={counts.tolist()} must be the same for all heads of a row")
        super().truncate(counts[:, :1], slack=slack)

    # -- reading -----------------------------------------------------------------------------------------------------

    def states(self, what: str) -> Float[Tensor, "B H T _"]:
        """Keys, in the frame that they came in, or values: made of latents, for who asks to see them."""
        which = 0 if what == "keys" else 1
        latent = self.plane("latent").float()
        made = torch.einsum("btc,hnc->bhtn", latent[:, 0], self.basis.maps()[which]).to(self.compute)
        if what == "values":
            return made
        b, h, t, _ = made.shape
        elite = self.plane("keys")[:, 0].view(b, t, h, self.plane("keys").shape[-1] // h).transpose(1, 2)
        keys = made.new_empty(b, h, t, self.basis.elite.shape[1])
        keys.scatter_(-1, self.basis.rest[None, :, None].expand(b, h, t, -1), made)
        return keys.scatter_(-1, self.basis.at[None, :, None].expand(b, h, t, -1), elite.to(self.compute))

    def absorbed(self, q: Float[Tensor, "B H G Q D"]) -> Float[Tensor, "B H G Q W"]:
        """Queries over what a token holds, W = H * 2r + C: zeros for the elite channels of other heads. Float32."""
        b, h, g, n, _ = q.shape
        at, rest = (x[None, :, None, None].expand(b, h, g, n, -1) for x in (self.basis.at, self.basis.rest))
        own = torch.zeros(b, h, g, n, h, at.shape[-1], dtype=torch.float32, device=q.device)
        each = torch.arange(h, device=q.device)
        own[:, each, :, :, each] = q.gather(-1, at).float().transpose(0, 1)
        latent = torch.einsum("bhgqn,hnc->bhgqc", q.gather(-1, rest).float(), self.basis.maps()[0])
        return torch.cat([own.flatten(-2), latent], -1)

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Over elite channels and latents as they lie. Raises ValueError for keys at compact positions."""
        if compact is not None and (compact.rows is None or self.counts()[compact.rows.cpu().numpy()].any()):
            raise ValueError(f"compact positions: {self.form} holds keys that no rotation of all channels can move")
        asked = self.absorbed(q)
        if read is None:
            return self._answer(asked, q.dtype, slice(None), scale, None, weights=weights)
        parts = [  # what is read may differ between heads
            self._answer(asked[:, i : i + 1], q.dtype, slice(i, i + 1), scale, read[:, i : i + 1], weights=weights)
            for i in range(self.kv_heads)
        ]
        out, lse, left = zip(*parts, strict=True)
        return torch.cat(out, 1), torch.cat(lse, 1), torch.cat(left, 1) if weights else None

    def _answer(
        self, asked: Tensor, dtype: torch.dtype, heads: slice, scale: float, read: Tensor | None, *, weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of some heads, which all look at the same tokens: as one head that many more ask."""
        b, h, g, n, w = asked.shape

        def block(start: int, stop: int) -> Block:
            latent = self.plane("latent", start, stop)
            return Block(torch.cat([self.plane("keys", start, stop), latent], -1), latent)

        got, lse, left = attend_blocks(
            asked.reshape(b, 1, h * g, n, w), scale, self.valid(), self.basis.rank, block, self.column,
            mass=LOG_MASS if self.weighed else None, read=read, weights=weights,
        )  # fmt: skip
        out = torch.einsum("bhgqc,hdc->bhgqd", got[:, 0].reshape(b, h, g, *got.shape[3:]), self.basis.maps()[1][heads])
        return (
            out.to(dtype),
            lse.view(b, h, g, n),
            None if left is None else left[:, 0].reshape(b, h, g, *left.shape[3:]),
        )

    # -- rows --------------------------------------------------------------------------------------------------------

    def join(self, other: Any) -> None:
        theirs = getattr(other, "form", type(other).__name__)
        if not isinstance(other, EliteSegment) or (other.form, other.kv_heads) != (self.form, self.kv_heads):
            raise ValueError(f"other={theirs} must be of format {self.form}")
        super().join(other)


def _joint(name: str, column: Shaped[Tensor, "B H T"]) -> Shaped[Tensor, "B 1 T"]:
    """What all heads have in common. Raises ValueError where they differ."""
    one = column[:, :1]
    if column.shape[1] > 1 and column.stride(1) and not bool((column == one).all()):
        raise ValueError(f"{name} must be the same for all heads of a row: their tokens are held together")
    return one
