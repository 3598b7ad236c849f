"""SpecPC: the model reads only those tokens of a prompt that a draft model looks at (arXiv:2506.08373)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.methods.scored import both_ends
from kvfold.options import check_choice, check_int, check_name
from kvfold.views import LayerView, RawPrompt


@method(
    "specpc",
    title="SpecPC",
    paper="2506.08373",
    kind="prefill",
    formula=r"a_j = \max_{\text{layer},\,h,\,i} \lambda_i \operatorname{softmax}(q_i^{(h)} K^\top)_j,\quad"
    r" \lambda_{T-w+i} = \tfrac{i}{w-1},\ i < w",
    options={
        "draft": "the model whose attention counts, by name or folder; None: the model itself",
        "window": "last tokens of the prompt that ask, and always stay",
        "kernel": "over how many neighbours importance is pooled; an even one looks further on than back",
        "neighbours": "how many tokens around a chosen one come with it",
        "pool": "how importance is pooled: max or avg",
        "queries": "over queries: max or mean",
        "reduce": "over heads, layers and steps: max or mean",
        "skip": "first layers of the draft that do not count",
        "weighted": "whether later queries of the window weigh more",
        "lookahead": "tokens that the draft says; from the second on each asks, too",
    },
)
@dataclass(frozen=True)
class SpecPC(Method):
    """Tokens that the prompt's last `window` tokens look at in a draft model, and what stands around them.

    `draft` (None: the model itself) reads the whole prompt; the model reads `budget` of its tokens as a prompt of
    its own, at positions without gaps. Each of the highest brings its neighbours, the nearest first.
    Differs from the paper: a budget without room for the window and 4 more tokens keeps both ends, ties go to the
    earlier token, importance is float32, at least one token of a row is read. "mean" is a sum, as in the code: each
    query counts as much. A further turn is a prompt of its own, of which as much is read, whatever is stored
    (reconstructed).
    """

    budget: Budget = 0.25
    draft: str | None = None
    window: int = 64
    kernel: int = 64
    neighbours: int = 64
    pool: str = "max"
    queries: str = "max"
    reduce: str = "max"
    skip: int = 0
    weighted: bool = True
    lookahead: int = 1

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_name("draft", self.draft, "a model's name or folder, or None for the model itself")
        for name, low in (("window", 1), ("kernel", 1), ("neighbours", 0), ("skip", 0), ("lookahead", 1)):
            check_int(name, getattr(self, name), low, high=4096)  # tokens that are said, or looked through one by one
        for name, allowed in (("pool", ("max", "avg")), ("queries", ("max", "mean")), ("reduce", ("max", "mean"))):
            check_choice(name, getattr(self, name), allowed)
        check_choice("weighted", self.weighted, (True, False))

    def read_order(self, prompt: RawPrompt) -> Int[Tensor, "B N"] | None:
        lengths = prompt.valid.sum(1).tolist()
        share = [self.budget * n + 1e-9 if isinstance(self.budget, float) else self.budget for n in lengths]
        counts = [min(n, max(1, int(each))) for n, each in zip(lengths, share, strict=True)]
        if counts == lengths:
            return None
        importance = self.importance(prompt)
        order = torch.full((len(counts), max(counts)), -1, device=prompt.ids.device, dtype=torch.int64)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            chosen = self.select(importance[row, :length], count) if count < length else torch.arange(length)
            chosen = chosen.to(order.device)
            order[row, order.shape[1] - count :] = prompt.valid[row].nonzero()[:, 0][chosen]
        return order

    def importance(self, prompt: RawPrompt) -> Float[Tensor, "B T"]:
        """What each row's tokens get, side by side from 0 on; what stands behind a row's last has no meaning."""
        total = torch.zeros(prompt.ids.shape, device=prompt.ids.device, dtype=torch.float32)

        def look(view: LayerView) -> None:
            nonlocal total
            if view.place.layer >= self.skip:
                # Every head holds every token: the how-manieth it is, is its place in the text.
                found = view.pack(self.looked_at(view)[:, None].expand_as(view.valid))[:, 0].to(total.device)
                found = F.pad(found, (0, total.shape[1] - found.shape[1]))  # cuts what the draft has said
                total = torch.maximum(total, found) if self.reduce == "max" else total + found

        prompt.look_ahead(self.lookahead, look, self.draft)
        return total

    def looked_at(self, view: LayerView) -> Float[Tensor, "B T"]:
        """What each token gets in one layer, of a prompt's last `window` queries or of a later token's one."""
        weights = view.attention(self.window)  # B H G W T
        size = view.queries.valid.sum(1).clamp(max=weights.shape[3])
        back = torch.arange(weights.shape[3] - 1, -1, -1, device=size.device)
        if self.weighted:
            share = (1 - back / (size[:, None] - 1).clamp(min=1)).clamp(min=0)  # B W
            weights = weights * share[:, None, None, :, None]
        per_head = weights.amax(3) if self.queries == "max" else weights.sum(3)
        return per_head.amax((1, 2)) if self.reduce == "max" else per_head.sum((1, 2))

    def select(self, importance: Float[Tensor, " T"], count: int) -> Int[Tensor, " N"]:
        """Which tokens of one prompt stay, ascending."""
        length, device = len(importance), importance.device
        left = (self.kernel - 1) // 2
        padded = F.pad(importance, (left, self.kernel - 1 - left))[None]
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d
        best = pool(padded, self.kernel, stride=1)[0].sort(descending=True, stable=True).indices[:count]

        left = (self.neighbours - 1) // 2
        offsets = sorted(range(-left, self.neighbours - left), key=abs) if self.neighbours else [0]
        never = len(best) * len(offsets)
        # When each token is named first: every chosen one brings its neighbours, the nearest first.
        turn = torch.full((length,), never, device=device, dtype=torch.int64)
        ranks = torch.arange(len(best), device=device) * len(offsets)
        for i, offset in enumerate(offsets):
            turn.scatter_reduce_(0, (best + offset).clamp(0, length - 1), ranks + i, "amin")
        first, last = both_ends(torch.tensor(count, dtype=torch.int64), self.window)
        turn[:first], turn[length - int(last) :] = -1, -1
        return turn.sort(stable=True).indices[:count].sort().values
