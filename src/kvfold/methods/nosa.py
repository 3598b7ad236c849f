"""NOSA: blocks that the query asks for, and blocks that are worth reading whoever asks (arXiv:2510.13602)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold import artefacts
from kvfold.budgets import Budget, check_budget
from kvfold.formats import LOG_MASS, Chunk
from kvfold.methods._calibrated import bound_data
from kvfold.methods.base import Method, method
from kvfold.options import check_int, check_number
from kvfold.selectors import Always, Lasting, Selection, Vote, WindowMeans
from kvfold.views import Place, Site

SHARE = 0.5
"""Most of what is read that the first and the last blocks take (ours): all 17 of the paper's from 35 blocks on."""


@method(
    "nosa", title="NOSA", paper="2510.13602", kind="select",
    formula=r"""
        \kappa_j = \tfrac1{32} \textstyle\sum_{t=16j}^{16j+31} k_t, \quad
            S_b = \max_{j = 4b-1}^{4b+3} \sum_g \operatorname{softmax}_j(q_g \cdot \kappa_j / \sqrt D)
        e_t = A\,\operatorname{softplus}(\delta(v_t)), \quad
            E_b = \max_{j = 4b-1}^{4b+3} \tfrac1{32} \textstyle\sum_{t=16j}^{16j+31} e_t
        \Gamma_q = \text{forced} \cup \operatorname{top}(S), \quad
            \Gamma = \Gamma_q \cup \operatorname{top}(E), \quad
            o = \operatorname{softmax}_{t \in \Gamma}(q \cdot k_t / \sqrt D + e_t)\, v
    """,
    options={
        "budget": "what a generated token reads: a fraction of the text so far, or a number of tokens",
        "query": "share of it that the query chooses, the newest block counted in; 1: all, and no heads are needed",
        "block": "tokens that are read, or not, together",
        "window": "tokens of a window, whose mean key stands for them",
        "stride": "tokens from a window to the next",
        "sinks": "first tokens that are always read, fewer where the budget is small",
        "local": "tokens before the newest block that are always read, fewer where the budget is small",
    },
)  # fmt: skip
@dataclass(frozen=True)
class NOSA(Method):
    """Reads the first and the last blocks, a few that the query asks for, and those of most importance to any query.

    A block is worth to a query the most that the query heads of its KV head together give a window of keys that
    overlaps it. Its importance is that of such a window, the mean of its tokens' e: of a token a number for each KV
    head, by a linear map of the values of all KV heads, worked out once, added to its logit for good, and stored with
    it. So most of what is read stays the same from step to step, and only what the query chooses need be moved. At
    4,096 tokens: 18 blocks, 15, and 31. `kvfold calibrate nosa` trains the maps on the frozen model; none ship.
    Without them (a model that nobody trained) e has no meaning: it is 0 and the query chooses all that is free, which
    is InfLLM-V2's choice (arXiv:2509.24663); `query` is 1 then.
    Differs from the paper: a prompt is read whole and exactly, its queries without e, where the paper reads it by such
    choices, too; a further turn reads what is stored with its e, and its own tokens without. First and last blocks take
    at most half of the budget. Models are trained with e there; here e is fitted to a model that was not.
    """

    budget: Budget = 0.1
    query: float = 0.25
    block: int = 64
    window: int = 32
    stride: int = 16
    sinks: int = 64
    local: int = 1024
    calibration: str | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_number("query", self.query, 0.0, 1.0)
        for name in ("block", "window", "stride"):
            check_int(name, getattr(self, name), 1)
        for name in ("sinks", "local"):
            check_int(name, getattr(self, name), 0)
        if self.block % self.stride or self.window % self.stride:
            raise ValueError(f"stride={self.stride} must divide block={self.block} and window={self.window}")

    def bind(self, model: Any) -> "NOSA":
        """Raises ValueError for a calibration that is damaged, of another model, or given and missing."""
        if self.calibration is None and (self.query == 1 or not artefacts.has(self.info.slug, model)):
            return replace(self, query=1.0)
        where, found = artefacts.locate(self.info.slug, model, self.calibration)
        heads_of(found.data)
        return replace(self, calibration=where)

    @cached_property
    def heads(self) -> "list[Importance]":
        """Those of each paged layer. Raises ValueError where there are none."""
        return heads_of(bound_data(self.info.slug, self.calibration, "trained heads"))

    def listens(self, event: str) -> bool:
        """Without trained heads no token is given anything."""
        return super().listens(event) and (event != "stamp" or self.calibration is not None)

    def stamp(self, tokens: Chunk, place: Place) -> Mapping[str, Tensor]:
        if len(self.heads) != place.layers:  # said by the first layer
            given = f"calibration={self.calibration!r} of nosa has {len(self.heads)} layers"
            raise ValueError(f"{given}, the cache {place.layers}")
        values = tokens.values.masked_fill(~tokens.valid[..., None], 0.0)
        return {LOG_MASS: self.heads[place.ordinal].to(values.device)(values)}

    def selection(self, site: Site) -> Selection:
        weighed = self.calibration is not None
        return choice(self, weighed, Lasting(float(self.query)) if weighed and self.query < 1 else None)


def choice(nosa: NOSA, weighed: bool, lasting: Lasting | None) -> Selection:
    """What is read by those options; `weighed`: tokens have an importance."""
    index = WindowMeans(nosa.block, nosa.window, nosa.stride, weighed)
    always = Always(nosa.sinks, nosa.local, SHARE)
    return Selection(index, nosa.budget, Vote("max"), always, lasting=lasting)


@dataclass(frozen=True, eq=False)
class Importance:
    """The heads of one layer: e = A softplus(delta(v)), float32."""

    delta: Float[Tensor, "H C"]
    """Of the values of all KV heads side by side, C numbers, one for each KV head."""
    scale: Float[Tensor, " H"]
    """A."""

    def to(self, device: torch.device) -> "Importance":
        """The same there."""
        return self if self.delta.device == device else Importance(self.delta.to(device), self.scale.to(device))

    def slope(self, values: Float[Tensor, "B H T Dv"]) -> Float[Tensor, "B H T"]:
        """softplus(delta(v)): what tokens are ranked by."""
        delta = self.delta.view(len(self.delta), values.shape[1], -1)
        return F.softplus(torch.einsum("bhtd,khd->bkt", values.float(), delta))

    def __call__(self, values: Float[Tensor, "B H T Dv"]) -> Float[Tensor, "B H T"]:
        """e of each token, for each KV head."""
        return self.scale[:, None] * self.slope(values)


def heads_of(data: dict[str, Any]) -> list[Importance]:
    """What a calibration has, layer by layer. Raises ValueError for one that is damaged."""
    delta, scale = data.get("delta"), data.get("scale")
    if isinstance(delta, Tensor) and isinstance(scale, Tensor) and delta.dim() == 3 and delta.numel():
        fits = scale.shape == delta.shape[:2] and delta.shape[2] % delta.shape[1] == 0
        if fits and bool(delta.isfinite().all() and scale.isfinite().all()):
            return [Importance(a.float(), b.float()) for a, b in zip(delta, scale, strict=True)]
    found = {name: tuple(x.shape) if isinstance(x, Tensor) else None for name, x in data.items()}
    raise ValueError(f"the calibration of nosa must have finite delta (L, H, H Dv) and scale (L, H): it has {found}")
