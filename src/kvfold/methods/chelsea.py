"""Chelsea (CentroidKV): clusters within chunks, each of which becomes its centroid (arXiv:2506.11418)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.merges import FRAMES, absorb, at_home, counted, log_mass, mixed, over_set, rope_for, soft_match
from kvfold.methods.base import Method, method
from kvfold.methods.scored import recent
from kvfold.options import check_choice, check_int
from kvfold.views import LayerView
from kvfold.views.decisions import Decision, Keep


@method(
    "chelsea", title="Chelsea: online KV cache clustering", paper="2506.11418", kind="merge",
    formula=r"""
        b(a) = \arg\max_{b \in B} \cos(k_a, k_b), \quad A = \{0, 2, \dots\}, \; B = \{1, 3, \dots\} \text{ of a chunk}
        k_b \leftarrow \frac{\sum_i n_i k_i}{\sum_i n_i}, \quad v_b \leftarrow \frac{\sum_i n_i v_i}{\sum_i n_i},
            \quad n_b \leftarrow \sum_i n_i
        \mathrm{logit}_b = \frac{q^\top k_b}{\sqrt D} + \ln n_b
    """,
    options={
        "chunk": "tokens among which clusters are formed",
        "sinks": "first tokens that stay as they are, as far as a quarter of the budget goes",
        "window": "last tokens that stay as they are, as far as a quarter of the budget goes",
        "mass": 'what tells a query how many tokens a centroid stands for: "counted" or "convex" (nothing)',
        "frame": 'keys are compared and averaged as they are stored ("rotated") or as before RoPE ("unrotated")',
        "online": "also cluster every `chunk` generated tokens, in the proportion of the budget",
    },
)  # fmt: skip
@dataclass(frozen=True)
class Chelsea(Method):
    """Every other token of a chunk joins the likest of those between, the best pairs of a head first.

    A round takes at most half of the tokens; rounds go on over what is left until the budget is met. A centroid
    stands where its odd member stood, is the mean of all its tokens, and counts as many (`mass`).
    Differs from the paper: there is no code, and of the text only the abstracts and secondary summaries were read.
    Chunk size, protected tokens, the choice over all chunks of a head, rounds, counting and what happens while decoding
    are reconstructed. Generated tokens are appended; with `online` (the paper, as far as known) each `chunk` of them is
    clustered when it is full, so that the cache goes on growing, but more slowly: not a bound, and therefore off.
    """

    budget: Budget = 0.25
    chunk: int = 64
    sinks: int = 4
    window: int = 64
    mass: str = "counted"
    frame: str = "rotated"
    online: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("chunk", self.chunk, 2)
        check_int("sinks", self.sinks, 0)
        check_int("window", self.window, 0)
        check_choice("mass", self.mass, ("counted", "convex"))
        check_choice("frame", self.frame, FRAMES)
        check_choice("online", self.online, (False, True))

    def listens(self, event: str) -> bool:
        return self.online if event == "after_decode" else super().listens(event)

    def after_prefill(self, view: LayerView) -> list[Decision] | None:
        budget = view.budget(self.budget)
        need = (view.count - budget).clamp(min=0)
        if not need.any():
            return None
        window = torch.maximum((budget // 4).clamp(max=self.window), (budget > 1).long().clamp(max=self.window))
        protected = recent(view, window) | (view.rank < (budget // 4).clamp(max=self.sinks)[..., None])
        decisions = self.clustered(view, view.valid & ~protected, need)
        return [decisions[0], Keep(decisions[1].mask & (budget > 0)[..., None], decisions[1].columns)]

    def after_decode(self, view: LayerView) -> list[Decision] | None:
        generated = view.place.seen - view.place.prompt
        full = (generated > 0) & (generated % self.chunk == 0)
        if not full.any():
            return None
        tail = view.positions >= (view.place.seen - self.chunk).to(view.valid.device)[:, None, None]
        left = [max(1, int(self.chunk * fraction)) for fraction in view.fraction(self.budget)]
        need = torch.tensor(left, device=view.valid.device, dtype=torch.int64)[:, None]
        tail = view.valid & tail & full.to(view.valid.device)[:, None, None]
        return list(self.clustered(view, tail, (tail.sum(-1) - need).clamp(min=0)))

    def clustered(
        self, view: LayerView, free: Bool[Tensor, "B H T"], need: Int[Tensor, "B H"]
    ) -> tuple[Decision, Keep]:
        """Merge until each head has `need` tokens less, or one of `free` is left."""
        rope = rope_for(view, self.frame)
        keys = view.keys.float() if rope is None else rope.shift(view.keys.float(), -view.positions)
        many, home, left = log_mass(view).exp(), at_home(free), torch.minimum(need, free.sum(-1) - 1)
        weight = many
        while bool((left > 0).any()):
            step = soft_match(keys, free, self.chunk, left)
            total = over_set(weight, step)
            keys, weight = mixed(keys, step, weight / total), total
            moved = free & (step != at_home(step))
            free, left, home = free & ~moved, left - moved.sum(-1), step.gather(-1, home)
        columns = counted(view, home) if self.mass == "counted" else {}
        share = many / over_set(many, home)
        return absorb(view, home, share, rope=rope), Keep(view.valid & (home == at_home(home)), columns)
