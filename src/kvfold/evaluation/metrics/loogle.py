"""The scores of LooGLE (arXiv:2311.04939) that need neither a model nor a download.

Left out: METEOR (needs WordNet), BERTScore and the judge (models), and the reordering figures, whose official script
overwrites each sample's deviation with the largest possible one.
"""

import ast
import json
from collections import Counter
from collections.abc import Sequence
from math import exp
from statistics import fmean

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import Scores, metric


def _mean_rouge_l(scores: Sequence[Scores]) -> float:
    return 100.0 * fmean(each["rougeL"] for each in scores)


def _mean_bleu1(scores: Sequence[Scores]) -> float:
    return 100.0 * fmean(each["bleu1"] for each in scores)


def _hits(scores: Scores) -> tuple[float, float]:
    return 100.0 * scores["hits"], float(scores["masks"])


def _micro(scores: Sequence[Scores]) -> float:
    hits, masks = zip(*map(_hits, scores), strict=True)
    return float(sum(hits) / sum(masks))


def _bleu(found: list[str], wanted: list[str], size: int) -> float:
    """Clipped precision of the n-grams of one size times the brevity penalty, without smoothing."""
    grams, wanted_grams = (Counter(zip(*(words[at:] for at in range(size)), strict=False)) for words in (found, wanted))
    same = (grams & wanted_grams).total()
    return exp(min(0.0, 1 - len(wanted) / len(found))) * same / grams.total() if same else 0.0


@metric("loogle/bleu", title="BLEU-1, and 4-gram precision as LooGLE's BLEU-4", aggregate=_mean_bleu1)
def bleu(prediction: str, query: Query) -> Scores:
    """Of blank-separated words. BLEU-4 has weights 0, 0, 0, 1: the 4-grams alone, not the usual cumulative figure."""
    found, wanted = (prediction or "None").split(), _text.gold(query).split()
    return {"bleu1": _bleu(found, wanted, 1), "bleu4": _bleu(found, wanted, 4)}


@metric("loogle/rouge", title="recall of ROUGE-1, -2 and -L (package rouge); tables have -L", aggregate=_mean_rouge_l)
def rouge(prediction: str, query: Query) -> Scores:
    """Recall rewards long answers: compare at equal max_new_tokens only."""
    try:
        (scores,) = _text.library("rouge").Rouge().get_scores([prediction or "None"], [_text.gold(query)])
    except (ValueError, RecursionError):  # no words, or a thousand without a period: officially the end of the run
        return {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    return {f"rouge{kind.upper()}": float(scores[f"rouge-{kind}"]["r"]) for kind in ("1", "2", "l")}


def _masks(text: str) -> dict[str, str]:
    """A dictionary in JSON or Python's form; nothing else is evaluated. {} for anything else."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict):
            return {str(key): value for key, value in found.items() if isinstance(value, str)}
    return {}


def _gold_masks(query: Query) -> dict[str, str]:
    masks = _masks(_text.gold(query))
    if not masks:
        raise ValueError(f"query.answers={query.answers!r} must be a dictionary of masks for metric {query.metric}")
    return masks


@metric("loogle/cloze_exact", title="share of all masks filled exactly", aggregate=_micro, terms=_hits)
def cloze_exact(prediction: str, query: Query) -> Scores:
    """The answer is a dictionary {"<mask-0>": name, ...} in JSON or Python's form."""
    found, wanted = _masks(prediction), _gold_masks(query)
    return {"hits": float(sum(found.get(mask) == name for mask, name in wanted.items())), "masks": float(len(wanted))}


@metric(
    "loogle/cloze_partial", title="share of all masks filled with a word of the name", aggregate=_micro, terms=_hits
)
def cloze_partial(prediction: str, query: Query) -> Scores:
    found, wanted = _masks(prediction), _gold_masks(query)
    hits = sum(not set(found.get(mask, "").split()).isdisjoint(name.split()) for mask, name in wanted.items())
    return {"hits": float(hits), "masks": float(len(wanted))}
