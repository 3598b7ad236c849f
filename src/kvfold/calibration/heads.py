"""Which heads retrieve: attention of a recited answer's queries to the needle (HeadKV, CompressKV)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.calibration.questions import NeedleQuestion, questions
from kvfold.calibration.run import Run
from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.views import LayerView

Rows = Float[Tensor, "Hq N T"]
COUNTS_FROM = 0.5
"""Share of the answer's tokens that a model must rank first for a prompt to count."""
Score = Callable[[Rows, NeedleQuestion], Float[Tensor, " Hq"]]
"""From the attention of the answer's N queries to a number for each head."""


def copy_score(rows: Rows, asked: NeedleQuestion) -> Float[Tensor, " Hq"]:
    """HeadKV-R: steps at which the most attended token is the needle's and the one that is said, over its length."""
    start, stop = asked.span
    best, ids = rows.argmax(-1), asked.fed[0]  # Hq N
    said = torch.tensor(asked.answer, dtype=torch.int64)
    hit = (best >= start) & (best < stop) & (ids[best.cpu()] == said).to(best.device)
    return hit.sum(-1).float() / (stop - start)


def reason_score(rows: Rows, asked: NeedleQuestion) -> Float[Tensor, " Hq"]:
    """HeadKV-R2: attention of the N most attended tokens as far as they are the needle's N, over N."""
    start, stop = asked.span
    values, best = rows.topk(min(stop - start, rows.shape[-1]), dim=-1)
    return (values * ((best >= start) & (best < stop))).sum((1, 2)) / (stop - start)


def semantic_score(rows: Rows, asked: NeedleQuestion) -> Float[Tensor, " Hq"]:
    """CompressKV: attention to the whole needle at the steps that say one of its tokens, as often as it has that."""
    needle = asked.needle
    times = torch.tensor(
        [float(needle.count(token)) for token in asked.answer], device=rows.device, dtype=torch.float32
    )
    return rows[..., slice(*asked.span)].sum(-1) @ times


def headkv_tables(run: Run) -> dict[str, Any]:
    """HeadKV's tables "copy" and "reason", scores of the query heads."""
    samples, length = run.sizes(20, 1500)
    return {
        "copy": mean_scores(run, "copy", copy_score, samples, length),
        "reason": mean_scores(run, "reason", reason_score, samples, length),
    }


def mean_scores(run: Run, kind: str, score: Score, samples: int, length: int) -> list[list[float]]:
    """The mean of a score over the prompts that the model can answer: scores[layer][query head].

    The answer is fed, not decoded, and a prompt counts if the model itself ranks half of the answer's tokens first
    (reconstructed: the papers decode and ask for ROUGE-1 recall or F1 over 50). Raises ValueError if none counts.
    """
    found: list[Tensor] = []
    for number, asked in enumerate(questions(run, kind, samples, length), start=1):
        run.tick(f"{kind} {number} of {samples}")
        layers: list[Tensor] = []
        if answered(run, asked, lambda view, asked=asked, to=layers: to.append(score(answer_rows(view, asked), asked))):  # type: ignore[misc]
            found.append(torch.stack(layers).cpu())
    run.about[f"{kind} prompts counted"] = len(found)
    if not found:
        raise ValueError(f"{type(run.model).__name__} answered none of the {samples} prompts of kind {kind!r}")
    table: list[list[float]] = torch.stack(found).mean(0).tolist()
    return table


def answer_rows(view: LayerView, asked: NeedleQuestion) -> Rows:
    """Attention of the queries that say the answer."""
    return view.attention(len(asked.answer))[0].flatten(0, 1)


@torch.no_grad()
def answered(run: Run, asked: NeedleQuestion, observe: Callable[[LayerView], None]) -> bool:
    """Feed a prompt and its answer, showing every layer's view; whether the model would have said half of it."""
    cache, count = Cache(run.model, "full"), len(asked.answer)
    with cache.observed(observe):
        logits = run.model(asked.fed.to(run.model.device), logits_to_keep=count, **with_cache(run.model, cache)).logits
    said: Int[Tensor, " N"] = logits[0].argmax(-1).cpu()
    return bool((said == torch.tensor(asked.answer, dtype=torch.int64)).float().mean() >= COUNTS_FROM)


__all__ = ["answer_rows", "answered", "copy_score", "headkv_tables", "mean_scores", "reason_score", "semantic_score"]
