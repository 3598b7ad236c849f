"""JRT-Prompt: the model reads its prompt twice (arXiv:2407.05483)."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.methods.base import Method, method
from kvfold.options import check_int
from kvfold.views import RawPrompt


@method(
    "jrt-prompt",
    title="JRT-Prompt: Just Read Twice",
    paper="2407.05483",
    kind="prefill",
    formula=r"\text{answer} = \operatorname{LM}(\underbrace{P, \ldots, P}_{\text{copies}})",
    options={"copies": "how often the prompt is read"},
)
@dataclass(frozen=True)
class JRTPrompt(Method):
    """Every token of the prompt, `copies` times over, so that all but the first reading know what is asked.

    A token that only begins texts (BOS) is read once. The cache grows with the copies; compress it with a method
    behind this one: `jrt-prompt | snapkv(budget=0.25)`.
    Differs from the paper: this is its formula LM(C, Q, C, Q); its prompts (a cue, the context twice, the question)
    are texts, made by `kvfold.evaluation.twice`. A further turn is repeated by itself (reconstructed).
    """

    copies: int = 2

    def __post_init__(self) -> None:
        check_int("copies", self.copies, 1, high=64)

    def read_order(self, prompt: RawPrompt) -> Int[Tensor, "B N"] | None:
        if self.copies == 1:
            return None
        size = prompt.ids.shape[1]
        columns = torch.arange(size, device=prompt.ids.device).expand(prompt.ids.shape)
        columns = columns.masked_fill(~prompt.valid, -1)
        first = prompt.valid & (prompt.valid.cumsum(1) == 1)
        again = columns.masked_fill(first & (prompt.ids == begin(prompt.model)), -1)
        order = torch.cat([columns, *[again] * (self.copies - 1)], 1)
        order = order.gather(1, torch.argsort((order >= 0).byte(), dim=1, stable=True))  # padding first
        return order[:, int((order < 0).sum(1).min()) :]


def begin(model: object) -> int:
    """The token that a text begins with; -1 where a model has none."""
    config = getattr(model, "config", None)
    found = getattr(config.get_text_config(decoder=True), "bos_token_id", None) if config is not None else None
    return -1 if found is None else int(found)
