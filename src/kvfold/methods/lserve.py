"""LServe: some heads stream for good, the others read pages by bounds on two levels (arXiv:2502.14866)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.formats import Reader
from kvfold.methods._calibrated import Table, check_table, measured, unbound
from kvfold.methods.base import Method, method
from kvfold.methods.duoattention import published, retrieval_heads
from kvfold.options import check_int, check_number
from kvfold.selectors import Always, Every, Hierarchical, Selection, SomeHeads
from kvfold.views import LayerView, Site
from kvfold.views.decisions import Keep, Streams

GATES = "duoattention"
"""Whose calibration says which heads need the whole text."""
LEAST = 3
"""Pages that are read whatever the budget is."""


@method(
    "lserve", title="LServe", paper="2502.14866", kind="select",
    formula=r"""
        S_p = \max_{l \in p} \sum_d \max(q_d m_{l,d},\, q_d M_{l,d})
        \mathrm{streams}_{l,h} \iff \alpha_{l,h} \lt Q_\sigma(\alpha)
    """,
    options={
        "budget": "what a token of a retrieval head reads: a fraction of the text so far, or a number of tokens",
        "page": "tokens that are read together, a physical page",
        "logical": "tokens whose bounds are remembered together, a logical page; divides a page",
        "interval": "a choice of pages is made where the text's length is a multiple of it",
        "static_sparsity": "share of the heads that stream (sigma)",
        "sinks": "first tokens that a streaming head keeps, in whole pages",
        "recent": "last tokens that a streaming head keeps, in whole pages and the open one",
        "prompt_recent": "last tokens that a streaming head sees of a prompt, and keeps between its chunks",
        "gates": "the gate of each KV head, a row a layer (alpha); None: from duoattention's calibration",
    },
)  # fmt: skip
@dataclass(frozen=True)
class LServe(Method):
    """Reads the newest page, and those of the others in which one small part promises most; some heads hold no more.

    Of each logical page of 16 tokens the least and largest number of every channel of its keys (after RoPE) are
    remembered; a page of 64 is worth its best logical page, in float32. Each query head has a list of its own, of at
    least three pages, made anew every `interval` tokens of its row's text and after a further turn; the newest page is
    read in any case and counts. `static_sparsity` of all layers' heads, those with the lowest gates of DuoAttention,
    hold and read sinks and recent pages alone (reconstructed: that the paper forces sinks on the others, too, where the
    code does not). The budget is of the others: the paper's is 4,096 tokens, ours a tenth of the text.
    Of a prompt streaming heads see before each token the last `prompt_recent` and the sinks, and hold as much between
    its chunks, in whole pages, all of which a further chunk sees; the others see all of it, as in the official code
    (the paper adds MInference for them: reconstructed, and not done here).
    Differs from the paper: gates that tie go to the earlier head; keys and values stay as the model made them unless a
    stage behind it codes them.
    """

    budget: Budget = 0.1
    page: int = 64
    logical: int = 16
    interval: int = 4
    static_sparsity: float = 0.0
    sinks: int = 128
    recent: int = 256
    prompt_recent: int = 8192
    gates: Table | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name in ("page", "logical", "interval", "recent", "prompt_recent"):
            check_int(name, getattr(self, name), 1)
        check_int("sinks", self.sinks, 0)
        check_number("static_sparsity", self.static_sparsity, 0.0, 1.0)
        check_table("gates", self.gates)
        if self.page % self.logical:
            raise ValueError(f"page={self.page} must be a multiple of logical={self.logical}")

    def bind(self, model: Any) -> "LServe":
        if not self.static_sparsity or self.gates is not None:
            return self
        if self.calibration is not None and self.calibration.endswith(".tsv"):
            return replace(self, gates=published(self.calibration), calibration=None)
        return replace(self, gates=measured(GATES, model, "gates", self.calibration), calibration=None)

    def listens(self, event: str) -> bool:
        """Where no head streams, nothing is dropped."""
        return super().listens(event) and (event == "selection" or self.static_sparsity > 0)

    def selection(self, site: Site) -> Reader:
        chosen = Selection(Hierarchical(self.page, self.logical), self.budget, least=LEAST, reuse=Every(self.interval))
        whole = self.retrieval(site.ordinal, len(site.paged))
        return chosen if all(whole) else SomeHeads(chosen, whole, Always(self.sinks, self.recent))

    def streams(self, site: Site) -> Streams | None:
        whole = self.retrieval(site.ordinal, len(site.paged))
        return None if all(whole) else Streams(tuple(not one for one in whole), self.sinks, self.prompt_recent)

    def retrieval(self, ordinal: int, layers: int) -> tuple[bool, ...]:
        """Which KV heads of a layer, one of so many on pages, hold everything; empty where all do."""
        if not self.static_sparsity:
            return ()
        if self.gates is None:
            raise unbound(self.info.slug, "gates", GATES)
        if len(self.gates) != layers:
            raise ValueError(f"gates of lserve has {len(self.gates)} layers; the model has {layers} layers on pages")
        return retrieval_heads(self.gates, float(self.static_sparsity))[ordinal]

    def after_prefill(self, view: LayerView) -> Keep | None:
        return self._kept(view, self.prompt_recent)

    def after_decode(self, view: LayerView) -> Keep | None:
        """Pages go whole: there is something to do where one was opened, or where the prompt has just ended."""
        seen, prompt = view.place.seen, view.place.prompt
        opened = (seen - 1) // self.page > (seen - 1 - view.new) // self.page
        due = opened | (seen - view.new <= prompt)
        return self._kept(view, self.recent) if bool(due.any()) else None

    def _kept(self, view: LayerView, recent: int) -> Keep | None:
        """The first pages that hold the sinks, the last ones that hold `recent` tokens, and the one that is open."""
        whole = self.retrieval(view.place.ordinal, view.place.layers)
        if all(whole):
            return None
        near = view.positions < self._whole(self.sinks)
        near |= view.positions >= self._begin(view.place.seen, recent).to(near.device)[:, None, None]
        return Keep(view.valid & (torch.tensor(whole, device=near.device, dtype=torch.bool)[:, None] | near))

    def _begin(self, seen: Int[Tensor, " B"], recent: int) -> Int[Tensor, " B"]:
        """Where in the text the pages begin that streaming heads hold beside the sinks."""
        return (seen - 1) // self.page * self.page - self._whole(recent)

    def _whole(self, tokens: int) -> int:
        """As many as whole pages have."""
        return -(-tokens // self.page) * self.page
