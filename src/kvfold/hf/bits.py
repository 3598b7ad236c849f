"""Tokens or bits: in which format a limit in bytes is best spent, by what was measured (`kvfold calibrate memory`).

A limit holds some tokens as the model made them, twice as many in eight bits, four times as many in four. Which of
these does least harm depends on the model and on how much of the text they are. The table says it: the KL to the full
cache under `kvfold`, for each format and each share of the text's tokens that a head keeps. For a model that nobody
has measured it is the geometric mean of the tables that ship, over the formats that need nothing of a model.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import exp, log
from statistics import mean
from typing import Any

from transformers import PreTrainedModel

from kvfold import artefacts
from kvfold.hf.support import has_windows
from kvfold.methods.base import Method, stages_of
from kvfold.methods.registry import parse
from kvfold.options import shown

MEMORY = "memory"
"""What the table is called among artefacts."""
PLAIN = ""
"""No format: numbers as the model made them."""
TURNED = tuple(f"turboquant(bits={bits})" for bits in (4, 3, 2))
GENERAL = (PLAIN, "fp8", *TURNED)
"""Formats by token, which any method goes with, of which nothing has to be known of a model."""
WEIGHED = tuple(f"turboquant(bits={bits}, basis='channels')" for bits in (4, 3, 2))
MEASURED = (*WEIGHED, *(f"turboquant(bits={bits}, basis='measured')" for bits in (4, 3)))
"""Those that stand on a calibration of their own (`kvfold calibrate turboquant`)."""
WINDOWS = "windows"
"""The stage that has sliding windows hold codes, behind any of them."""
LEAST = 1e-6
"""A KL below which nothing is told apart."""


@dataclass(frozen=True)
class Harm:
    """KL (nats a token) of each format, by the share of tokens kept: `shares` ascending to 1, a row for each."""

    shares: tuple[float, ...]
    kl: Mapping[str, tuple[float, ...]]

    def of(self, form: str, share: float) -> float:
        """A straight line between two shares, both on logarithmic scales, which goes on below the first.

        Above the last share under 1 it goes on, too, down to what all tokens have, which is rounding alone: a line from
        there to a KL of 0 would fall off a cliff.
        """
        row, most = self.kl[form], len(self.shares) - 2
        at = next((i for i in range(most) if share <= self.shares[i + 1]), most - 1)
        (low, high), (first, second) = self.shares[at : at + 2], (max(kl, LEAST) for kl in row[at : at + 2])
        part = log(share / low) / log(high / low)
        return max(row[-1], exp((1 - part) * log(first) + part * log(second)))


def table(data: Mapping[str, Any], name: str) -> Harm:
    """What an artefact holds. Raises ValueError for what is no such table."""
    shares: Any = data.get("shares")
    forms: Any = data.get("forms")
    rows: Any = data.get("kl")
    if not (_numbers(shares) and isinstance(forms, list) and isinstance(rows, list) and len(forms) == len(rows)):
        raise ValueError(f"the calibration of memory for {shown(name)} lacks shares, forms or kl")
    between = len(shares) > 2 and shares[0] > 0 and shares[-1] == 1
    ascending = between and all(low < high for low, high in pairwise(shares))
    if not ascending or not all(_numbers(row) and len(row) == len(shares) for row in rows):
        raise ValueError(f"the calibration of memory for {shown(name)} has rows that are no KL by shares up to 1")
    for form in forms:
        if form != PLAIN and any(hasattr(stage, "budget") for stage in _stages(form, name)):
            raise ValueError(f"the calibration of memory for {shown(name)} has {shown(form)}, which is no format alone")
    if PLAIN not in forms or len({*forms}) < len(forms):
        raise ValueError(f"the calibration of memory for {shown(name)} must have each form once, and '' among them")
    return Harm(tuple(shares), {str(form): tuple(row) for form, row in zip(forms, rows, strict=True)})


def _stages(form: Any, name: str) -> Sequence[Method]:
    try:
        return tuple(stages_of(parse(form)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the calibration of memory for {shown(name)} has {shown(form)}: {error}") from None


def _numbers(row: Any) -> bool:
    real = isinstance(row, list) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in row)
    return real and all(0 <= n <= sys.float_info.max for n in row)  # false for what is not a number


def harm_of(model: PreTrainedModel) -> Harm:
    """What was measured on the model, else on those that ship."""
    if not artefacts.has(MEMORY, model):
        return usual()
    found = artefacts.find(MEMORY, model)
    return table(found.data, str(found.model.get("name")))


@lru_cache(maxsize=1)
def usual() -> Harm:
    """The geometric mean of the tables that ship, of the formats and shares that all of them have."""
    paths = [path for path in artefacts.shipped() if path.parent.name == MEMORY]
    tables = [table(artefacts.load(path).data, path.stem) for path in paths]
    shares = tuple(sorted(set.intersection(*(set(each.shares) for each in tables))))
    forms = [form for form in GENERAL if all(form in each.kl for each in tables)]

    def middle(form: str, share: float) -> float:
        return exp(mean(log(max(LEAST, each.of(form, share))) for each in tables))

    return Harm(shares, {form: tuple(middle(form, share) for share in shares) for form in forms})


def with_form(method: Method, form: str) -> Method:
    """The method with the stages of a form behind it."""
    return method | parse(form) if form else method


def choices(model: PreTrainedModel, method: Method, harm: Harm) -> Sequence[str]:
    """Forms that the method may go with: itself alone where it says how its tokens lie.

    Raises ValueError for a calibration of a form that is damaged.
    """
    if method.format is not None or method.firm or method.windows is not None:
        return [PLAIN]
    windows, known = has_windows(model), artefacts.has("turboquant", model)
    found = [PLAIN]
    for form in harm.kl:
        if form == PLAIN:
            continue
        behind = parse(form)
        if (behind.windows is not None and not windows) or (behind.needs and not known):
            continue
        behind.bind(model)
        found.append(form)
    return found
