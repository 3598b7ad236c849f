"""RazorAttention: retrieval heads keep all, others sinks, a buffer and one compensation token (arXiv:2407.15891)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.formats import LOG_MASS, Chunk
from kvfold.methods._calibrated import Table, check_table, filled, table_of
from kvfold.methods.base import Method, method
from kvfold.options import check_int, check_number
from kvfold.views import LayerView
from kvfold.views.decisions import Rewrite


@method(
    "razorattention", title="RazorAttention", paper="2407.15891", kind="merge",
    formula=r"""
        k_c = \frac{1}{N_d}\sum_{t \in \mathrm{dropped}} k_t,
            \quad v_c = \frac{1}{N_d}\sum_{t \in \mathrm{dropped}} v_t,
            \quad \mathrm{logit}_c = \frac{q^\top k_c}{\sqrt D} + \ln N_d
    """,
    options={
        "induction_ratio": "share of the heads that are kept whole as induction heads",
        "echo_ratio": "share of the heads that are kept whole as echo heads",
        "sinks": "first tokens that the other heads keep",
        "local": "last tokens that the other heads keep, at least",
        "share": "last tokens that the other heads keep, as a share of the prompt, where that is more",
        "induction": "induction scores of the KV heads, a row a layer; None: from the calibration",
        "echo": "echo scores of the KV heads, a row a layer; None: from the calibration",
    },
)  # fmt: skip
@dataclass(frozen=True)
class RazorAttention(Method):
    """Induction heads (top `induction_ratio`) and echo heads (top `echo_ratio`) of the model keep every token.

    The others hold, of N tokens, the first `sinks`, the last max(`local`, `share` N), and the mean key and value of
    all that lies between as one token that weighs as many as it stands for: ln N_d on its logit. Acts at the end of
    a prompt; generated tokens are appended, and a further prompt folds them. Not under `local` + `sinks` tokens, so
    for shorter texts than the paper's lower `local`. The scores of the KV heads come from `kvfold calibrate`. No
    budget: memory follows from the ratios. A ratio above 0 protects one head at least: of fewer than 50 heads 1 % is
    none, of 3 heads (gemma3-270m has no more on pages) 14 % too.
    Differs from the paper: that least head is ours; `local` and `share` are reconstructed, and so is the weight N_d
    (Huawei's toolkit has a buffer of 251 tokens, `local=251, share=0.0`, and weight 1).
    """

    induction_ratio: float = 0.14
    echo_ratio: float = 0.01
    sinks: int = 4
    local: int = 4000
    share: float = 0.2
    induction: Table | None = None
    echo: Table | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        for name in ("induction_ratio", "echo_ratio", "share"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_int("sinks", self.sinks, 0)
        check_int("local", self.local, 1)
        check_table("induction", self.induction)
        check_table("echo", self.echo)

    def bind(self, model: Any) -> "RazorAttention":
        return filled(self, model, {"induction": "induction", "echo": "echo"})

    def after_prefill(self, view: LayerView) -> Rewrite | None:
        tables = [table_of(self, view, name, view.heads) for name in ("induction", "echo")]
        roles = (
            retrieval_heads(tables[0], float(self.induction_ratio)),
            retrieval_heads(tables[1], float(self.echo_ratio)),
        )
        whole = torch.tensor(
            [a or b for a, b in zip(*(r[view.place.ordinal] for r in roles), strict=True)], dtype=torch.bool
        )
        folded = self.dropped(view, whole.to(view.valid.device))
        if not folded.any():
            return None
        mass = (
            view.columns[LOG_MASS].exp()
            if LOG_MASS in view.columns
            else torch.ones(view.valid.shape, dtype=torch.float32).to(folded.device)
        )
        weight = mass * folded  # B H T
        total = weight.sum(-1, keepdim=True)
        slot = folded & (folded.cumsum(-1) == 1)  # the compensation token takes the first slot of what it stands for

        def mean(states: Tensor) -> Tensor:
            folded_in = torch.einsum("bht,bhtd->bhd", weight / total.clamp(min=1.0), states.float())[:, :, None]
            return torch.where(slot[..., None], folded_in.to(states.dtype), states)

        columns = {**view.columns, LOG_MASS: torch.where(slot, total, mass).log()}
        return Rewrite(Chunk(mean(view.keys), mean(view.values), view.valid & (slot | ~folded), columns))

    def dropped(self, view: LayerView, whole: Bool[Tensor, " H"]) -> Bool[Tensor, "B H T"]:
        """What lies between sinks and buffer of the heads that are not whole."""
        length = view.place.prompt.to(view.valid.device)
        buffer = (length * self.share + 1e-6).long().clamp(min=self.local)[:, None, None]
        between = (view.rank >= self.sinks) & (view.rank < view.count[..., None] - buffer)
        return view.valid & between & ~whole[:, None]


@lru_cache(maxsize=64)
def retrieval_heads(scores: Table, ratio: float) -> tuple[tuple[bool, ...], ...]:
    """The `ratio` share of all heads with the highest scores, ties to the earlier; one at least if it is not 0."""
    flat = torch.tensor([score for row in scores for score in row], dtype=torch.float64)
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(round(ratio * len(flat)), ratio > 0)]] = True
    return tuple(tuple(row) for row in chosen.view(len(scores), -1).tolist())
