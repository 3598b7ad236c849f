"""Shadowed: a prompt's keys before RoPE as a product of low rank, all else as it is (ShadowKV, arXiv:2410.21465)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvfold.formats.flat import Flat
from kvfold.formats.joint_keys import (
    BASES,
    EXACT,
    EXACT_AT,
    JOINT,
    LATENT,
    MOST_PIECES,
    NOWHERE,
    PIECE,
    JointKeys,
)
from kvfold.formats.paged import open_table, refilled
from kvfold.formats.segment import Segment, Spec, Traits
from kvfold.formats.shadow_pages import ShadowPages
from kvfold.formats.tailed import Tailed, TailedSegment
from kvfold.formats.tokens import POSITION, Chunk
from kvfold.options import check_int
from kvfold.pages import PAGE_SIZE, PagePool, PageTable, Plane

CODED = "coded."


@dataclass(frozen=True)
class Shadowed(Tailed):
    """Of a prompt's tokens `rank` numbers each for the keys of all KV heads, and a basis of H D x `rank` for them all.

    Keys are turned back to position 0, those of all heads stand side by side, and the basis is that of the nearest
    product of such a rank. They are multiplied by it and turned to their positions when they are read. As they are stay
    values, the last `local` chunks of `chunk` tokens and what is behind them, generated tokens, and of each head the
    keys of the `outliers` chunks that are least like their mean. Whatever comes together is a prompt: as soon as what
    lies before the last chunks takes less room so, basis and outliers included, it is a piece with a basis of its own;
    until then, and with a rank of H D or more, it stays as it is.
    All heads hold the same tokens. A crop leaves what is coded as it is; of a chunk that it cuts the rest is as if it
    had come so. Where a layer's rotation is not known, keys are coded as they come.
    """

    rank: int = 160
    chunk: int = 8
    local: int = 4
    outliers: int = 48

    whole = False
    traits: ClassVar[Traits] = Traits(addressed="whole", frame="unrotated", crops="approximate")

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_int("chunk", self.chunk, 1)
        check_int("local", self.local, 0)
        check_int("outliers", self.outliers, 0)

    @property
    def group(self) -> int:  # type: ignore[override]
        """Tokens that leave the tail together."""
        return self.chunk

    @property
    def residual(self) -> int:  # type: ignore[override]
        """Tokens that stay in the tail, at least."""
        return self.local * self.chunk

    def rank_of(self, spec: Spec) -> int:
        """Numbers of a token's keys: no more than there are."""
        return min(self.rank, spec.heads * spec.key_size)

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What the first part holds of each (row, head)."""
        return {"values": Plane(spec.value_size, spec.dtype), POSITION: Plane(None, torch.int32)}

    def latents(self, spec: Spec) -> dict[str, Plane]:
        """What it holds of each row."""
        return {LATENT: Plane(self.rank_of(spec), spec.dtype), PIECE: Plane(None, torch.uint8)}

    def open(self, spec: Spec) -> "ShadowedSegment":
        values = open_table(self, spec, self.planes(spec), PAGE_SIZE)
        keys = open_table((self, LATENT), replace(spec, heads=1), self.latents(spec), PAGE_SIZE)
        b, h, d, dtype = spec.rows, spec.heads, spec.key_size, spec.dtype
        bases = torch.zeros(b, 0, h, d, self.rank_of(spec), dtype=dtype, device=spec.device)
        exact = torch.zeros(b, h, 0, d, dtype=dtype, device=spec.device)
        at = torch.zeros(b, h, 0, dtype=torch.int32, device=spec.device)
        joint = JointKeys(keys, spec.rope, bases, exact, at)
        return ShadowedSegment(self, ShadowPages(values, h, dtype, joint), self.open_tail(spec))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        """See `Format.check`."""
        counts, coded = self._counts(spec, said)
        if (counts != counts[:, :1]).any() or (coded != coded[:, :1]).any() or (coded % self.chunk).any():
            raise ValueError(
                f"counts={counts.tolist()}, coded={coded.tolist()} must be the same for all heads of a row, and what "
                f"is coded whole chunks of {self.chunk}"
            )
        beside, tokens = _beside(tensors)
        super().check(spec, said, tokens, seen)
        total, pieces, exact = int(coded[:, 0].sum()), beside.get(BASES), beside.get(EXACT)
        number = 0 if pieces is None or pieces.dim() < 2 else pieces.shape[1]
        apart = 0 if exact is None or exact.dim() < 3 else exact.shape[2]
        b, h, d, rank = spec.rows, spec.heads, spec.key_size, self.rank_of(spec)
        want = {
            LATENT: ((total, rank), spec.dtype), PIECE: ((total,), torch.uint8),
            BASES: ((b, number, h, d, rank), spec.dtype), EXACT: ((b, h, apart, d), spec.dtype),
            EXACT_AT: ((b, h, apart), torch.int32),
        }  # fmt: skip
        found = {name: (tuple(x.shape), x.dtype) for name, x in beside.items()}
        if found != want:
            raise ValueError(f"coded={found} must be {want} (shape, dtype)")
        at, ends = beside[EXACT_AT].long(), torch.from_numpy(coded)
        inside = (at == NOWHERE) | ((at >= 0) & (at < ends[..., None].to(at.device)))
        if not bool(inside.all()) or not bool((at.diff(dim=-1) >= 0).all()):
            raise ValueError(f"{EXACT_AT} must be slots below coded={coded.tolist()}, ascending, or {NOWHERE}")
        most = int(beside[PIECE].max()) + 1 if total else 0
        if most != number:
            raise ValueError(f"{PIECE} must name {number} bases, and names {most}")

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "ShadowedSegment":
        """See `Format.restore`."""
        if twin is not None:
            found = super().restore(spec, said, {}, twin)
            assert isinstance(found, ShadowedSegment)
            return found
        self.check(spec, said, tensors)
        (counts, coded), segment = self._counts(spec, said), self.open(spec)
        segment.coded.refill(coded, {n.removeprefix(CODED): x for n, x in tensors.items() if n.startswith(CODED)})
        tail = {n.removeprefix("tail."): x for n, x in tensors.items() if n.startswith("tail.")}
        refilled(segment.tail, counts - coded, tail)
        return segment


def _beside(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a state has of keys that are coded, and all else."""
    names = {f"{CODED}{name}": name for name in JOINT}
    beside = {names[name]: x for name, x in tensors.items() if name in names}
    return beside, {name: x for name, x in tensors.items() if name not in names}


class ShadowedSegment(TailedSegment[ShadowPages]):
    """What is coded, then tokens as they are."""

    def _moved(self, more: np.ndarray) -> np.ndarray:
        """Tokens that are coded when so many more come together, (B, H): those that take less room so."""
        if not (more > 1).any():
            return np.zeros_like(more)
        form, coded, joint = self.form, self.coded.counts(), self.coded.joint
        rank, wide = joint.rank, joint.heads * joint.exact.shape[-1]
        over = np.maximum(((coded + self.tail.counts() + more) // form.chunk - form.local) * form.chunk - coded, 0)
        pays = over * (wide - rank) > wide * (rank + np.minimum(form.outliers * form.chunk, over))
        pays &= (joint.pieces() < MOST_PIECES)[:, None]
        return np.where((more > 1) & pays, over, 0)

    def _leave(self, tokens: Flat) -> None:
        self.coded.fold(tokens, self.form.chunk, self.form.outliers)

    def nbytes_with(self, more: np.ndarray) -> int:
        moved = self._moved(more)
        apart = np.minimum(self.form.outliers * self.form.chunk, moved[:, 0])
        return self.coded.nbytes_after(moved, apart) + self.tail.nbytes_with(np.maximum(more - moved, 0))

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        return super().pages_for(more) | self.coded.pages_for(self._moved(more))

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """Raises ValueError, and changes nothing, where heads bring different tokens."""
        valid = chunk.valid
        if not even and valid.shape[1] > 1 and valid.stride(1) and not bool((valid == valid[:, :1]).all()):
            raise ValueError(f"valid must be the same for all heads of a row: {self.form} holds their keys together")
        super().append(chunk, even=even)

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        """See `Segment.keep`. Only the end of a row can go, or all of it: the same of all heads."""
        valid, _ = self.columns()
        stays = valid & mask
        counts = stays.sum(-1)
        first = valid & (valid.cumsum(-1) <= counts[..., None])
        if not bool((counts == counts[:, :1]).all()) or not torch.equal(stays, first):
            raise ValueError(f"mask drops single tokens of {self.form}, which holds those of all heads together")
        cut = self.coded.longest
        if columns:
            for part in self.parts:
                part.add_columns(columns)
            self.coded.set_columns({name: column[..., :cut] for name, column in columns.items()})
            self.tail.keep(valid[..., cut:], {name: column[..., cut:] for name, column in columns.items()})
        if not torch.equal(stays, valid):
            self.truncate(counts.cpu().numpy(), slack=slack)

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        raise ValueError(f"slots={tuple(slots.shape)}: {self.form} holds tokens of all heads together, written once")

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        if (counts != counts[:, :1]).any():
            raise ValueError(f"counts={counts.tolist()} must be the same for all heads of a row")
        counts, coded, chunk = np.minimum(counts, self.counts()), self.coded.counts(), self.form.chunk
        whole = np.where(counts < coded, counts // chunk * chunk, coded)
        left = np.where(counts < coded, counts - whole, 0)
        self.ask({self.tail.pool: int((-(-left // self.tail.pool.page_size)).sum())})
        slots = torch.arange(self.coded.longest, device=self.tail.pool.device)
        begin, end = (torch.from_numpy(x).to(slots.device)[..., None] for x in (whole, whole + left))
        some, real = self.coded.listed_tokens((slots >= begin) & (slots < end))
        planes = {name: plane[real] for name, plane in some.items()}
        planes["keys"] = planes["keys"].to(self.tail.compute)
        self.coded.truncate(whole, slack=slack)
        self.tail.table.cut(np.maximum(counts - coded, 0).reshape(-1))
        self.tail.table.add(left.reshape(-1), planes)
        self.tail.table.trim(slack=slack)

    def tables(self) -> list[PageTable]:
        return [*self.coded.tables, self.tail.table]
