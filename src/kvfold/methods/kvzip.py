"""KVzip: keep what the model looks at while it writes the prompt out once more (arXiv:2505.23416)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.budgets import Budget, check_budget, is_all
from kvfold.methods._repeated import repeated
from kvfold.methods.base import Method, method
from kvfold.methods.scored import recent
from kvfold.options import check_choice, check_int
from kvfold.scores import ranked, top_mask
from kvfold.scores.peaks import peaks
from kvfold.views import LayerView, PromptView, Requests
from kvfold.views.decisions import Keep

SCORE = "kvzip_score"
TINY, UNKNOWN = 1e-30, 1.0
"""The least score of a token that was judged, and that of one that was not: generated since the last prompt."""


@method(
    "kvzip", title="KVzip", paper="2505.23416", kind="evict",
    formula=r"""
        s_{l,h,t} = \max_{g} \max_{i \in \mathrm{repetition}} A_{l,h,g,i,t}
        K = \mathrm{top}_{LHb}(s)
    """,
    options={
        "chunk": "tokens that are repeated at a time",
        "overlap": "last tokens of the chunk before that the question quotes",
        "prefix": "first tokens that every repetition sees, and that are ranked first",
        "level": '"pair" shares the budget over all heads and layers, "uniform" gives each the same',
    },
)  # fmt: skip
@dataclass(frozen=True)
class KVzip(Method):
    """The highest attention a token gets while the model repeats the prompt, `chunk` tokens at a time.

    The model is asked to repeat (from the chunk before, whose last `overlap` tokens it is given) and reads the chunk
    as its own answer; nothing of that stays. Queries see the first `prefix` tokens, the chunk and what they repeat.
    `level="pair"` shares the budget freely over all heads and layers, "uniform" evenly. Costs about two prefills,
    and positions for a chunk and the question beyond the prompt; generated tokens are appended.
    Differs from the paper: the prefix is a number of tokens, not the template's system prompt, and is ranked with
    the rest, but first; the newest token always stays; the budget is met exactly; scores are float32. Without a
    tokenizer beside the model's weights it repeats unasked. On a further turn, or after a chunk of a prompt, what is
    new is scored and competes with the scores of what was kept (reconstructed); the answer between has the highest.
    It needs layers and heads to spare: on gemma3-270m, with three layers of full attention and one KV head each, most
    tokens score high in the first (median 0.6), and of a quarter as a budget the last is left 1 % of its tokens.
    """

    budget: Budget = 0.3
    chunk: int = 2000
    overlap: int = 8
    prefix: int = 4
    level: str = "pair"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("chunk", self.chunk, 1)
        check_int("overlap", self.overlap, 0)
        check_int("prefix", self.prefix, 0)
        check_choice("level", self.level, ("pair", "uniform"))

    def after_prompt(self, prompt: PromptView) -> Requests[Mapping[int, Keep]]:
        if is_all(self.budget):
            return {}
        views = [prompt[ordinal] for ordinal in range(len(prompt))]
        scores = yield from repeated(prompt, views, self.judge, self.chunk, self.overlap)
        for view, found in zip(views, scores, strict=True):
            found += view.columns.get(SCORE, torch.zeros_like(found))
            found.masked_fill_(found == 0, UNKNOWN)
        masks = self.choose(views, scores)
        return {i: Keep(mask, {SCORE: found}) for i, (mask, found) in enumerate(zip(masks, scores, strict=True))}

    def judge(self, view: LayerView, part: Bool[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
        """The highest attention among the first tokens, what is repeated, and what repeats it."""
        among = part | (view.valid & (view.positions < self.prefix))
        among[..., -view.new :] = view.valid[..., -view.new :]
        slots = among.flatten(0, 1).any(0).nonzero()[:, 0]  # the rest of a long prompt costs nothing
        tokens = view.tokens.but(among).take(slots.expand(*among.shape[:2], -1))
        found = peaks(replace(view, tokens=tokens, memo={})).clamp(min=TINY)
        return torch.zeros(among.shape, device=found.device, dtype=torch.float32).index_copy(2, slots, found)

    def choose(
        self, views: Sequence[LayerView], scores: Sequence[Float[Tensor, "B H _"]]
    ) -> Sequence[Bool[Tensor, "B H _"]]:
        """What each layer keeps."""
        counts = [view.budget(self.budget) for view in views]
        ranks = []
        for view, found, count in zip(views, scores, counts, strict=True):
            first = view.positions < (count - 1).clamp(min=0, max=self.prefix)[..., None]
            always = first | recent(view, count.clamp(max=1))
            ranks.append(ranked(view, found, always))
        if self.level == "uniform":
            return [top_mask(rank, count) for rank, count in zip(ranks, counts, strict=True)]
        one = ranks[0].device  # layers may lie on several
        flat = torch.cat([rank.flatten(1).to(one) for rank in ranks], 1)[:, None]
        total = torch.stack([count.sum(1).to(one) for count in counts]).sum(0)[:, None]
        kept = torch.split(top_mask(flat, total)[:, 0], [rank[0].numel() for rank in ranks], dim=1)
        return [mask.view(rank.shape).to(rank.device) for mask, rank in zip(kept, ranks, strict=True)]
