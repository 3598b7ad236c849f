"""EpiCache: keep what a few typical parts of a conversation look at (arXiv:2509.17396)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold import artefacts
from kvfold.budgets import Budget, check_budget, is_all
from kvfold.budgets.sensitive import by_sensitivity
from kvfold.methods._calibrated import check_table, filled
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores import ranked, top_mask
from kvfold.scores.peaks import peaks
from kvfold.views import LayerView, PromptView, ReadOn, Requests
from kvfold.views.decisions import Keep

ASK = (
    "\n\nWrite down what matters in this part of the conversation: who speaks and what they are like, what happened "
    "and when, private details, promises, opinions, how people stand to each other, feelings, and rare experiences."
)


@method(
    "epicache", title="EpiCache", paper="2509.17396", kind="evict",
    formula=r"""
        s_{l,h,t} = \max_{g} \max_{i \in \mathrm{patch}} \mathrm{softmax}_t(q_{l,h,g,i} K_{l,h} / \sqrt{D})
        b_l = L b \frac{(1 - \sigma_l)^p}{\sum_j (1 - \sigma_j)^p}
        K_l = \mathrm{top}_{H b_l}(s_l)
    """,
    options={
        "patch": "text that the patched prompt gives as the model's answer: typical parts of an episode",
        "level": '"pair": the heads of a layer compete, "pair-uniform": each has the same budget',
        "sinks": "first tokens that always stay",
        "power": "how sharply layers differ by their sensitivity, 0 for not at all (p)",
        "floor": "least share of the mean budget that a layer has",
        "sensitivity": "a number a layer (1 - sigma); None: from the calibration",
    },
)  # fmt: skip
@dataclass(frozen=True)
class EpiCache(Method):
    """The highest attention a token gets from a patched prompt: an instruction, and the text `patch` as its answer.

    Made for prompts in blocks, `Cache(prefill_chunk=...)`: after each, the patched prompt is read on (nothing of it
    stays), s[h, i] = max over its queries and the group of softmax(q K_h / sqrt(D))_i over the cached keys alone, old
    and new, and each layer falls to its budget. No layer ever holds more than that, a block and the patched prompt.
    `level="pair"`: the heads of a layer compete for its budget; "pair-uniform": each has the same. Nothing is protected
    but the first `sinks` tokens. A layer's budget is in proportion to `sensitivity` to the `power` (0: all the same),
    1 - the cosine of its keys with and without a view of earlier blocks, from `kvfold calibrate epicache`; that is 0
    for the first layer, so give a `floor` beside a power. `kvfold.conversations.episodes` has a cache for each part of
    a chat.
    Differs from the paper: the instruction is in our words; the patched prompt follows the block (the official code
    starts it at the position of the block's last token); scores are float32; `floor` is paid for by the other layers
    (the official code's 0.25 exceeds the budget), and sensitivities are not stretched to 0 to 1 over the layers (the
    code does, the paper not); `sinks` are ours. Without a tokenizer beside the weights the last 64 tokens of the block
    are read again: the official code's SnapKV.
    """

    budget: Budget = 8192
    patch: str | None = None
    level: str = "pair"
    sinks: int = 0
    power: float = 0.0
    floor: float = 0.0
    sensitivity: tuple[float, ...] | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_choice("level", self.level, ("pair", "pair-uniform"))
        check_int("sinks", self.sinks, 0)
        check_number("power", self.power, 0.0, 64.0)
        check_number("floor", self.floor, 0.0, 1.0)
        check_table("sensitivity", None if self.sensitivity is None else (self.sensitivity,))
        if self.patch is not None and not isinstance(self.patch, str):
            raise ValueError(f"patch={self.patch!r} must be a text, or None")

    def bind(self, model: Any) -> "EpiCache":
        return filled(self, model, {"sensitivity": "sensitivity"}) if self.power else self

    def after_prompt(self, prompt: PromptView) -> Requests[Mapping[int, Keep]]:
        if is_all(self.budget):
            return {}
        views = [prompt[ordinal] for ordinal in range(len(prompt))]
        counts = [self.counts(view) for view in views]
        if not any(self.over(view, count) for view, count in zip(views, counts, strict=True)):
            return {}
        kept: dict[int, Keep] = {}

        def judge(view: LayerView) -> None:
            i = view.place.ordinal
            kept[i] = Keep(self.choose(views[i], cached_peaks(view), counts[i]))

        yield ReadOn(*self.patched(prompt), judge)
        return kept

    def patched(self, prompt: PromptView) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """Ids and validity of what is read on; rows that this block did not reach read nothing."""
        words = prompt.encode(ASK)
        if words:
            words = [*words, *prompt.answer(), *prompt.encode(self.patch or "")]
            ids = prompt.ids.new_tensor(words, dtype=prompt.ids.dtype).expand(len(prompt.ids), -1)
            return ids, prompt.valid.any(1, keepdim=True).expand(-1, len(words))
        order = torch.argsort(prompt.valid.byte(), dim=1, stable=True)[:, -64:]  # padding first
        # Then behind them: a sliding window counts columns, and between two texts of a row padding would fill it.
        order = order.gather(1, torch.argsort(~prompt.valid.gather(1, order), dim=1, stable=True))
        return prompt.ids.gather(1, order), prompt.valid.gather(1, order)

    def counts(self, view: LayerView) -> Int[Tensor, "B H"]:
        """How many tokens each (row, head) of a layer may keep, before its heads compete."""
        if not self.power:
            return view.budget(self.budget)
        if self.sensitivity is None or len(self.sensitivity) != view.place.layers:
            how = artefacts.command("epicache", "MODEL")
            raise ValueError(
                f"sensitivity={self.sensitivity!r} must be {view.place.layers} numbers, one a layer: {how}"
            )
        shares = by_sensitivity(self.sensitivity, float(self.power), float(self.floor))
        return view.budget(self.budget, lambda _: shares)

    def over(self, view: LayerView, count: Int[Tensor, "B H"]) -> bool:
        """Whether a layer holds more than its budget."""
        held, count = view.count, count.to(view.count.device)
        return bool((held.sum(1) > count.sum(1)).any() if self.level == "pair" else (held > count).any())

    def choose(
        self, view: LayerView, scores: Float[Tensor, "B H T"], count: Int[Tensor, "B H"]
    ) -> Bool[Tensor, "B H T"]:
        """What a layer keeps: its budget's best, of all heads together or of each."""
        count = count.to(scores.device)
        first = view.positions < count.clamp(max=self.sinks)[..., None]
        ranks = ranked(view, scores, first)
        if self.level == "pair-uniform":
            return top_mask(ranks, count)
        return top_mask(ranks.flatten(1)[:, None], count.sum(1, keepdim=True))[:, 0].view(ranks.shape)


def cached_peaks(view: LayerView) -> Float[Tensor, "B H T"]:
    """The highest attention of the pass's queries to each token from before the pass, among those tokens alone."""
    stored = view.valid.shape[-1] - view.new
    cached = view.valid.clone()
    cached[..., stored:] = False
    return peaks(replace(view, tokens=view.tokens.but(cached), memo={}))[..., :stored]
