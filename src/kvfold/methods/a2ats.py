"""A2ATS: each key before RoPE is one of a few measured vectors, by which a query chooses (arXiv:2502.12665)."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvfold import artefacts
from kvfold.budgets import Budget, check_budget
from kvfold.methods._calibrated import bound_data
from kvfold.methods.base import Method, method
from kvfold.options import check_int
from kvfold.rotation import Measured, Rope
from kvfold.selectors import Always, Codebook, Selection, Vectors, Vote
from kvfold.selectors.vectors import MOST
from kvfold.views import Site


@method(
    "a2ats", title="A²ATS", paper="2502.12665", kind="select",
    formula=r"""
        H = \mathbb E\big[(R_b q)^\top (R_b q)\big] = L L^\top, \quad
            \mathrm{code}(k) = \arg\min_c \lVert k L - C_c \rVert
        \hat u_{h,t} = R_b q_h \cdot C_{\mathrm{code}(t)} L^{-1}, \quad
            I = \text{sinks} \cup \bigcup_{h \in \text{group}} \operatorname{top}_m(\hat u_h) \cup \text{window}
    """,
    options={
        "budget": "what a generated token reads: a fraction of the text so far, or a number of tokens",
        "sinks": "first tokens that are always read, fewer where the budget is small",
        "window": "last tokens that are always read, the newest one of them; fewer where the budget is small",
    },
)  # fmt: skip
@dataclass(frozen=True)
class A2ATS(Method):
    """Reads the first and the last tokens, and of those between what any query head of a KV head would look at most.

    Each key before RoPE is remembered as the number of the nearest of a head's vectors, two bytes; which is nearest is
    measured by what queries make of the difference. A query is compared with those vectors as if it stood one distance
    behind all keys (windowed RoPE: near tokens are read anyhow, and far ones ranked alone). `kvfold calibrate a2ats`
    measures vectors and distance; `--codes` says how many, 1,024 unless told, where the paper has 4,096, a codebook of
    256 MiB for an 8B model. Sinks and window together take at most half of the budget.
    Differs from the paper: its `topk` is a share for each query head, so that a KV head reads between once and G times
    as much; here the budget is what a KV head reads, window and sinks in it, and its heads' best are in turn taken
    until it is full. With 3 % a head the paper reads 6 % in all (reconstructed). Tokens stay where the cache lies.
    """

    budget: Budget = 0.1
    sinks: int = 8
    window: int = 64
    calibration: str | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("sinks", self.sinks, 0)
        check_int("window", self.window, 1)

    def bind(self, model: Any) -> "A2ATS":
        """Raises ValueError for a calibration that is missing, damaged, or of another model."""
        where, found = artefacts.locate(self.info.slug, model, self.calibration)
        codebooks(found.data)
        return replace(self, calibration=where)

    @cached_property
    def needs(self) -> tuple[Measured, ...]:  # type: ignore[override]
        """The codebooks."""
        return (Codebooks(self.calibration),)

    def selection(self, site: Site) -> Selection:
        return Selection(
            Vectors(self.needs[0].key), self.budget, Vote("union"), Always(self.sinks, self.window - 1, 0.5)
        )


@dataclass(frozen=True)
class Codebooks:
    """What was measured of each layer's keys; nothing is read before a layer asks."""

    calibration: str | None

    @property
    def key(self) -> str:
        """Where it lies."""
        return self.calibration or "measured"

    @cached_property
    def layers(self) -> list[Codebook]:
        """Those of each paged layer."""
        return codebooks(bound_data("a2ats", self.calibration, "codebooks"))

    def of_layer(self, ordinal: int, rope: Rope | None) -> Codebook:
        """See `Measured.of_layer`."""
        if ordinal >= len(self.layers):
            raise ValueError(f"the calibration of a2ats has {len(self.layers)} layers, not number {ordinal}")
        return self.layers[ordinal]


def codebooks(data: dict[str, Any]) -> list[Codebook]:
    """What a calibration has, layer by layer. Raises ValueError for one that is damaged."""
    turn, centres, distance = (data.get(name) for name in ("turn", "centres", "distance"))
    whole = isinstance(turn, Tensor) and turn.dim() == 4 and turn.numel() > 0 and turn.shape[2] == turn.shape[3]
    if whole and isinstance(turn, Tensor) and isinstance(centres, Tensor) and isinstance(distance, Tensor):
        fits = centres.dim() == 4 and (*centres.shape[:2], centres.shape[3]) == turn.shape[:3]
        if fits and 0 < centres.shape[2] <= MOST and distance.shape == turn.shape[:1]:
            lower = torch.equal(turn, turn.tril()) and bool((turn.diagonal(dim1=-2, dim2=-1) > 0).all())
            finite = bool(turn.isfinite().all() and centres.isfinite().all())
            if not lower or not finite or distance.dtype != torch.int64:
                raise ValueError("the calibration of a2ats has codebooks that are not finite, or of no moment")
            return [Codebook(a.float(), b, int(c)) for a, b, c in zip(turn, centres, distance, strict=True)]
    found = {name: tuple(x.shape) if isinstance(x, Tensor) else None for name, x in data.items()}
    raise ValueError(f"the calibration of a2ats must have turn, centres and distance of each layer: it has {found}")
