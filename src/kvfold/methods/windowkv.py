"""WindowKV: whole runs of tokens, chosen by the first layer of a group for all of it (arXiv:2503.17922)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.budgets.layers import line, tokens_each
from kvfold.methods.base import Method, method
from kvfold.methods.scored import exempt
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores import keep_top
from kvfold.views import LayerView
from kvfold.views.decisions import Keep

SUFFIX = {"localization": 32, "aggregation": 16}
"""Tasks, and how many queries at the end of the prompt score the runs."""


@method(
    "windowkv", title="WindowKV", paper="2503.17922", kind="evict",
    formula=r"""
        s_r = \frac{1}{HG}\sum_{h,g} \mathrm{mean}\Big(\mathrm{top}_{|r|/2} \Big\lbrace \sum_{i \in W}
            A_{h,g,i,t} : t \in r \Big\rbrace\Big)
        b_{last} = \min\Big(1, \frac{g}{\beta}\Big)(b - w) + w, \quad b_{first} = 2b - b_{last},
            \quad \text{a line between}
    """,
    options={
        "task": '"localization" (one place answers: the upper half of a run counts) or "aggregation" (all of it)',
        "run": "tokens of a run (r)",
        "suffix": "tokens at the prompt's end that score the runs and stay (W); None: 32 or 16, by task",
        "group": "layers that keep the same runs (g)",
        "beta": "the last group gets group / beta of the mean",
    },
)  # fmt: skip
@dataclass(frozen=True)
class WindowKV(Method):
    """Runs of `run` tokens by the attention of the last `suffix` queries, which stay too; all heads keep the same.

    The first of each `group` layers chooses, the others take its choice; a group's budget falls linearly, the last
    gets group / `beta` of the mean. `task`: for "localization" (one place answers) a run counts by the upper half of
    its tokens in each head, `suffix` is 32; for "aggregation" by all of them, and it is 16. Acts at the end of a
    prompt; generated tokens are appended.
    Differs from the paper: a budget without room for the window and 4 more tokens keeps both ends of the text; the task
    is an option (the paper's BERT classifier is not public, and a cache sees no text); the suffix counts towards the
    budget, and so does what whole runs leave over of it, less than a run for each head: it lengthens the suffix. The
    best runs are taken as long as they fit. Rows choose for themselves.
    """

    budget: Budget = 0.25
    task: str = "localization"
    run: int = 8
    suffix: int | None = None
    group: int = 8
    beta: float = 14.0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_choice("task", self.task, tuple(SUFFIX))
        check_int("run", self.run, 1, high=2**16)  # a run is laid out whole
        if self.suffix is not None:
            check_int("suffix", self.suffix, 1)
        check_int("group", self.group, 1)
        check_number("beta", self.beta, 1.0)

    @property
    def observed(self) -> int:
        """Tokens at the end of the prompt that score the others."""
        return SUFFIX[self.task] if self.suffix is None else self.suffix

    def after_prefill(self, view: LayerView) -> Keep:
        group = f"{self}, layers {view.place.ordinal // self.group}"
        chosen = view.place.step.get(group)
        if chosen is None:
            chosen = view.place.step[group] = self.choose(view)
        chosen = chosen.to(view.valid.device)  # a group's layers may lie on several
        places = view.positions.long().clamp(max=chosen.shape[1] - 1)  # padding may stand behind
        picked = chosen.gather(1, places.flatten(1)).view_as(view.valid)
        counts = self.counts(view)
        # What is chosen, then the newest.
        order = view.rank.float() + picked * view.valid.shape[-1]
        return keep_top(view, order, counts, always=exempt(view, counts, self.observed))

    def counts(self, view: LayerView) -> Int[Tensor, "B H"]:
        """What each (row, head) of this layer may keep."""
        each = tokens_each(self.budget, view.place.prompt, view.place.seen)
        layers = view.place.layers
        return view.budget(self.budget, [layer_shares(c, self.observed, layers, self.group, self.beta) for c in each])

    def choose(self, view: LayerView) -> Bool[Tensor, "B N"]:
        """The text positions whose runs are kept in all layers of this layer's group."""
        last = min(view.place.ordinal // self.group * self.group + self.group, view.place.layers) - 1
        least = self.counts(replace(view, place=replace(view.place, ordinal=last))).amin(
            1
        )  # rounding favours the first
        free = view.valid & ~view.last(self.observed)
        mass = view.attention(self.observed).sum(3).masked_fill(~free[:, :, None], 0.0)  # B H G T
        runs = max(1, -(-int(view.place.seen.max()) // self.run))  # by text position
        places = view.positions.long().clamp(max=runs * self.run - 1)
        laid = mass.new_zeros(*mass.shape[:3], runs * self.run)
        laid = laid.scatter_add(-1, places[:, :, None].expand_as(mass), mass).view(*mass.shape[:3], runs, self.run)
        there = mass.new_zeros(*places.shape[:2], runs * self.run).scatter_add(-1, places, free.float())
        there = there.view(*there.shape[:2], runs, self.run)  # B H N run
        best = max(1, self.run // 2) if self.task == "localization" else self.run
        among = there.sum(-1).clamp(min=1, max=best)[:, :, None]
        score = (laid.topk(best, dim=-1).values.sum(-1) / among).mean((1, 2))  # B N
        order = score.argsort(stable=True, dim=-1, descending=True)
        sizes = there.sum(-1).amax(1).gather(1, order)
        fits = sizes.cumsum(-1) <= (least - self.observed)[:, None]
        return torch.zeros_like(fits).scatter(1, order, fits).repeat_interleave(self.run, 1)


def layer_shares(mean: float, suffix: int, layers: int, group: int, beta: float) -> tuple[float, ...]:
    """Tokens of each layer, `mean` on average, the suffix in it: the weights of a budget."""
    rest = mean - suffix
    if rest <= 0:
        return (1.0,) * layers
    last = rest * min(1.0, group / beta)
    steps = line(2 * rest - last, last, -(-layers // group)).repeat(group)[:layers]
    return tuple(float(suffix + share) for share in steps)
