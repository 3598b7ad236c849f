"""How a forced text's logits compare with the full cache's: put together here, taken in `kvfold.evaluation.asking`."""

from collections.abc import Sequence
from math import exp
from statistics import fmean

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics.base import Scores, metric


def _mean_kl(scores: Sequence[Scores]) -> float:
    return fmean(each["kl"] for each in scores)


def _nats(scores: Scores) -> tuple[float, float]:
    return float(scores["nll"] * scores["tokens"]), float(scores["tokens"])


def _perplexity(scores: Sequence[Scores]) -> float:
    nats, tokens = zip(*map(_nats, scores), strict=True)
    return exp(sum(nats) / sum(tokens))


@metric("agreement", title="mean KL(full || compressed) in nats a token", aggregate=_mean_kl, higher=False)
@metric("perplexity", title="perplexity of the forced text", aggregate=_perplexity, higher=False, terms=_nats)
def _not_from_text(prediction: str, query: Query) -> Scores:
    raise ValueError("agreement and perplexity are measured on logits: a query that asks for them needs a target")
