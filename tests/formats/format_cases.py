"""What the tests of formats share: the formats, ragged tokens, and what a segment says that it holds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.formats import (
    LOG_MASS,
    POSITION,
    Balanced,
    Chunk,
    Dense,
    Depth,
    Format,
    Fp8,
    Indexed,
    IndexedSegment,
    Kivi,
    Rotated,
    Segment,
    Separable,
    Sparse,
    Spec,
    Thin,
    Uneven,
)
from kvfold.formats.key_basis import KeyBasis
from kvfold.pages import Arena
from kvfold.selectors import (
    Always,
    Bounds,
    Gives,
    Heaviest,
    Hierarchical,
    Products,
    Proportions,
    Selection,
    SomeHeads,
    Takes,
    Unremembered,
    Vote,
)

B, H, G, D, DV = 3, 2, 2, 16, 8
LENGTHS = [[41, 17], [0, 30], [9, 8]]
"""Tokens of each (row, head): an empty one, and none a multiple of any page."""
FORMATS: dict[str, Format] = {
    "balanced": Balanced(4, page_size=8),
    "dense": Dense(page_size=4),
    "bf16": Dense(torch.bfloat16, page_size=4),
    "depth": Depth(0, page_size=4),
    "fp8": Fp8(page_size=4),
    "kivi": Kivi(group=8, residual=8, channels=4),
    "kivi-anew": Kivi(group=8, residual=8, requantise=True),
    "sparse": Sparse(residual=8, group=8),
    "thin": Thin(page_size=4),
    "separable": Separable(4, group=8, residual=8),
    "rotated": Rotated(scale="aligned", page_size=8),
    "rotated-basis": Rotated(key="known", page_size=8),
    "uneven": Uneven(exact=2, page_size=8),
    "bounds": Indexed(Dense(page_size=4), Selection(Bounds(4), 12)),
    "bounds-kivi": Indexed(Kivi(group=8, residual=8, requantise=True), Selection(Bounds(8), 0.5, Vote("sum"))),
    "hierarchical-heads": Indexed(
        Dense(page_size=4), SomeHeads(Selection(Hierarchical(8, 4), 12), (False, True), Always(4, 8))
    ),
    "takes": Indexed(Dense(page_size=4), Takes(Gives(0, Selection(Unremembered(4), 12)))),
    "values": Indexed(Dense(page_size=4), Heaviest(Unremembered(1), 12, Vote("sum"))),
    "products": Indexed(
        Dense(page_size=4), Selection(Products(2, 2, 1), 12, Vote("sum", softmax=True), Proportions(2))
    ),
}


def basis(heads: int, size: int) -> KeyBasis:
    """Directions of each head, in float16, and weights of 1/2 to 2."""
    rng = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(heads, size, size, generator=rng, dtype=torch.float64))[0]
    return KeyBasis(turn.half(), torch.logspace(-1, 1, size, base=2.0).expand(heads, -1).contiguous())


KNOWN = {"known": basis(H, D)}
"""What was measured for the formats that need that."""


def plain(form: Format) -> Format:
    """What the tokens lie in, where an index is beside them."""
    return form.form if isinstance(form, Indexed) else form


def pieces(segment: Segment) -> list[Any]:
    """What of a segment lies in a page table each."""
    held = segment.inner if isinstance(segment, IndexedSegment) else segment
    return list(getattr(held, "parts", [held]))


def indexes(*segments: Segment) -> int:
    """Bytes of indexes, which lie beside all pages."""
    return sum(x.index.nbytes for x in segments if isinstance(x, IndexedSegment))


def spec_of(tokens: Chunk, **more: Any) -> Spec:
    return Spec.of(tokens, artefact=KNOWN, **more)


def chunk(
    lengths: list[list[int]] | int, seed: int = 0, dtype: torch.dtype = torch.float32, start: int = 0, mass: bool = True
) -> Chunk:
    """Random tokens of rows that are padded on the left; an int is a length for all."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.full((B, H), lengths) if isinstance(lengths, int) else torch.tensor(lengths)
    (b, h), t = counts.shape, int(counts.max())
    keys, values = (torch.randn(b, h, t, d, generator=rng).to(dtype) for d in (D, DV))
    valid = torch.arange(t) >= t - counts[..., None]
    columns = {POSITION: (valid.cumsum(-1) - 1 + start).clamp(min=0).to(torch.int32)}
    if mass:
        columns[LOG_MASS] = torch.rand(b, h, t, generator=rng)
    return Chunk(keys, values, valid, columns)


def opened(form: Format, tokens: Chunk, **more: Any) -> Segment:
    segment = form.open(spec_of(tokens, **more))
    segment.append(tokens, even=bool(tokens.valid.all()))
    return segment


def held(tokens: Chunk | Segment) -> list[dict[str, Tensor]]:
    """Keys, values and columns of each (row, head)'s tokens, in order."""
    found = tokens if isinstance(tokens, Chunk) else tokens.dense()
    planes = {"keys": found.keys, "values": found.values, **found.columns}
    return [{n: x[i][found.valid[i]].clone() for n, x in planes.items()} for i in np.ndindex(*found.valid.shape[:2])]


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    """Bit for bit, NaN included."""
    return len(one) == len(other) and all(
        x.keys() == y.keys() and all(torch.equal(x[n].nan_to_num(9e9), y[n].nan_to_num(9e9)) for n in x)
        for x, y in zip(one, other, strict=True)
    )


def rows_of(tokens: Chunk, rows: list[int]) -> Chunk:
    """Some sequences, without the padding that all of them have."""
    start = int(tokens.valid.shape[-1] - tokens.valid[rows].sum(-1).max())
    columns = {name: column[rows, :, start:] for name, column in tokens.columns.items()}
    return Chunk(*(x[rows, :, start:] for x in (tokens.keys, tokens.values, tokens.valid)), columns)


def softmax(segment: Segment, q: Tensor, scale: float, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, probabilities) by definition, over what `dense` gives, in float64."""
    tokens = segment.dense()
    seen = tokens.valid if read is None else tokens.valid & read
    logits = torch.einsum("bhgqd,bhtd->bhgqt", q.double(), tokens.keys.double()) * scale
    if LOG_MASS in tokens.columns:
        logits = logits + tokens.columns[LOG_MASS][:, :, None, None].double()
    logits = logits.masked_fill(~seen[:, :, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse[..., None]).nan_to_num(0.0)
    out = torch.einsum("bhgqt,bhtd->bhgqd", weights, tokens.values.double().masked_fill(~seen[..., None], 0.0))
    return out.float(), lse.float(), weights.float()


def reachable(thing: Any) -> int:
    """Bytes of every tensor's storage and every array's buffer that can be reached, each once."""
    stores: dict[Any, int] = {}
    seen, todo = set(), [thing]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            stores["tensor", value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            stores["array", id(value)] = value.nbytes if value.flags.owndata else 0  # else it looks at a tensor
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list | tuple | set):
            todo.extend(value)
        elif isinstance(value, Spec):
            continue  # its artefact is the model's
        elif type(value).__module__.startswith("kvfold"):
            todo.extend(vars(value).values())
    return sum(stores.values())


def mask_for(form: Format, segment: Segment, seed: int = 0, share: float = 0.6) -> Tensor:
    """A random mask of tokens that the format lets go: whole pages where it is addressed by page."""
    valid, _ = segment.columns()
    rng = torch.Generator().manual_seed(seed)
    mask = valid & (torch.rand(valid.shape, generator=rng) < share)
    if isinstance(form := plain(form), Kivi) and not form.requantise:
        cut = segment.coded.longest
        pages = torch.rand(*valid.shape[:2], cut // form.group, generator=rng) < share
        mask[..., :cut] = valid[..., :cut] & pages.repeat_interleave(form.group, -1)
    return mask


ALL = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
ARENA = pytest.mark.parametrize("arena", [False, True], ids=["own pages", "arena"])


def query(n: int = 1, seed: int = 9) -> Tensor:
    return torch.randn(B, H, G, n, D, generator=torch.Generator().manual_seed(seed))


def arena_of(some: bool) -> Arena | None:
    return Arena(1 << 22) if some else None


OPERATIONS = {
    "append": lambda form, x: x.append(chunk([[9, 0], [20, 1], [1, 30]], seed=5)),
    "append even": lambda form, x: x.append(chunk(3, seed=6), even=True),
    "a column": lambda form, x: x.append(
        chunk(1).but(chunk(1).valid, {**chunk(1).columns, "age": torch.ones(B, H, 1)})
    ),
    "keep": lambda form, x: x.keep(mask_for(form, x), {}),
    "keep slack": lambda form, x: x.keep(mask_for(form, x, share=0.9), {}, slack=True),
    "note": lambda form, x: x.keep(x.columns()[0], {"age": torch.full(x.columns()[0].shape, 7.0)}),
    "keep and note": lambda form, x: x.keep(mask_for(form, x), {"age": torch.full(x.columns()[0].shape, 7.0)}),
    "amend": lambda form, x: x.amend(last(x), torch.ones(B, H, 1, D), torch.ones(B, H, 1, DV)),
    "truncate": lambda form, x: x.truncate(np.maximum(x.counts() - 19, 0)),
    "clear": lambda form, x: x.clear(),
}  # fmt: skip


def last(segment: Segment) -> torch.Tensor:
    """The slot of each row's last token, -1 where there is none."""
    valid, _ = segment.columns()
    return torch.where(valid, torch.arange(valid.shape[-1]), -1).amax(-1, keepdim=True)
