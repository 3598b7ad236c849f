"""CompressKV's calibration: semantic retrieval heads, then how much each layer's output suffers (arXiv:2508.02401)."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.calibration.heads import answered, mean_scores, semantic_score
from kvfold.calibration.questions import NeedleQuestion, questions
from kvfold.calibration.run import Run
from kvfold.hf.anatomy import projected
from kvfold.methods.compresskv import CompressKV
from kvfold.views import LayerView

BUDGET = 32
"""Tokens of every layer while its error is measured."""


def compresskv_tables(run: Run) -> dict[str, Any]:
    """`heads`, scores of the query heads, and `errors` of the layers, summing to 1.

    Differs from the paper: errors are measured on needles in running text, not on LongBench.
    """
    samples, length = run.sizes(20, 1500)
    heads = mean_scores(run, "copy", semantic_score, samples, length)
    method = CompressKV(budget=BUDGET, heads=tuple(map(tuple, heads)), errors=(1.0,) * len(heads))
    total = torch.zeros(len(heads), dtype=torch.float64)
    for number, asked in enumerate(questions(run, "reason", max(1, samples // 2), length), start=1):
        run.tick(f"error {number} of {max(1, samples // 2)}")
        layers: list[float] = []
        answered(run, asked, lambda view, asked=asked, to=layers: to.append(layer_error(view, asked, method)))  # type: ignore[misc]
        total += torch.tensor(layers, dtype=torch.float64)
    return {"heads": heads, "errors": (total / total.sum()).tolist()}


@torch.no_grad()
def layer_error(view: LayerView, asked: NeedleQuestion, method: CompressKV) -> float:
    """Sum over the answer's queries of |o_c - o| / (|o| + 1e-5): outputs from what `method` keeps, and from all."""
    prompt = asked.prompt.shape[1]
    tokens = view.tokens
    columns = {name: column[..., :prompt] for name, column in tokens.columns.items()}
    cut = replace(tokens, keys=tokens.keys[:, :, :prompt], values=tokens.values[:, :, :prompt],
                  valid=tokens.valid[..., :prompt], columns=columns)  # fmt: skip
    length = torch.tensor([prompt], dtype=torch.int64)
    before = replace(
        view, tokens=cut, memo={}, queries=view.queries.pick(torch.arange(prompt, device=view.valid.device)),
        place=replace(view.place, prompt=length, seen=length),
    )  # fmt: skip
    kept = torch.ones_like(tokens.valid)
    kept[..., :prompt] = method.after_prefill(before).mask
    full, less = (_output(view, len(asked.answer), mask) for mask in (tokens.valid, kept))
    return float(((less - full).norm(dim=-1) / (full.norm(dim=-1) + 1e-5)).sum())


def _output(view: LayerView, count: int, mask: Bool[Tensor, "B H T"]) -> Float[Tensor, "B N E"]:
    """What the layer's attention gives the last `count` queries over the tokens of `mask`, after its projection."""
    rows = view.attention(count) * mask[:, :, None, None]  # B H G N T
    rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-12)
    out = torch.einsum("bhgnt,bhtd->bnhgd", rows, view.values.float()).flatten(2)
    return projected(view.place.module, out.to(view.values.dtype)).float()
