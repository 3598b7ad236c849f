"""A limit in bytes: the most tokens, in as many bits as are best, with which a cache never holds more."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from math import inf

from transformers import PreTrainedModel

from kvfold.hf.bits import PLAIN, choices, harm_of, with_form
from kvfold.hf.costs import MANY, Costs, with_budget_of
from kvfold.methods.base import Method, formats_of, keeping, stages_of
from kvfold.methods.registry import parse
from kvfold.options import check_int, shown

LITTLE = 12
"""A budget in tokens with which a method shows what it keeps."""
UNITS = {"": 1, "b": 1} | {f"{p}{i}b": (1024 if i else 1000) ** n for n, p in enumerate("kmgt", 1) for i in ("", "i")}


def parse_memory(memory: object) -> int | float:
    """Bytes, or a share of what a dense float16 cache would hold: of 536870912, "512MiB", "0.5GB" or 0.1.

    Raises ValueError for anything else.
    """
    if isinstance(memory, float) and 0.0 < memory <= 1.0:
        return memory
    return parse_size("memory", memory, or_else=", or a share in (0, 1] of a dense float16 cache")


def parse_size(name: str, given: object, or_else: str = "") -> int:
    """Bytes, of 536870912, "512MiB" or "0.5GB". Raises ValueError for anything else, naming the argument."""
    size = 0
    if isinstance(given, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", given.lower())):
        number, unit = found.groups()
        if unit in UNITS and (unit or "." not in number):
            size = int(float(number) * UNITS[unit])
    elif isinstance(given, int) and not isinstance(given, bool):
        size = given
    if size >= 1:
        return size
    raise ValueError(f'{name}={shown(given)} must be bytes (int >= 1), a text such as "512MiB" or "2GB"{or_else}')


Cost = Callable[[Method], tuple[Costs, int]]
"""What a row takes under a method, here with a small budget, and the bytes of a dense float16 cache of the context."""


@dataclass(frozen=True)
class Spent:
    """What a limit buys in one format: `budget` tokens a head (None: less than one), at so much harm."""

    method: Method
    limit: int
    budget: int | None
    harm: float
    least: int
    """Bytes of the smallest budget, of all rows."""
    fixed: int


def within(
    model: PreTrainedModel, method: Method, memory: object, context: int | None, batch: int, cost: Cost,
    quantize: bool = True,
) -> Method:  # fmt: skip
    """The method with the largest budget in tokens with which a cache of `batch` rows holds at most `memory`.

    Everything counts, as in `Cache.nbytes`: columns, tables, tails of formats, remembered queries, windows, recurrent
    states. `context`: tokens of a row; a share of memory is one of a dense cache's for so many. Where it is given, the
    method says nothing of formats, and not all tokens fit as they are, then with `quantize` the format is chosen with
    the budget (`hf/bits.py`). `cost` says what a token takes; without `memory` the method stays as it is. Raises
    ValueError for a method that would not keep to a budget while it generates, and for a limit under which not one
    token fits, with the least that can be.
    """
    check_int("batch", batch, 1)
    if context is not None:
        check_int("context", context, 1)
    if memory is None:
        if context is not None or batch != 1 or not quantize:
            given = f"context={context!r}, batch={batch!r} and quantize={quantize!r}"
            raise ValueError(f"{given} are what memory= is for, which is not given")
        return method
    limit = parse_memory(memory)
    slug = taker(method).info.slug
    if isinstance(limit, float) and context is None:
        raise ValueError(f"memory={limit!r} is a share of a dense cache: say of how many tokens, by context=")
    plain = spend(method, limit, batch, cost)
    spent = [plain]
    if quantize and context is not None and (plain.budget is None or plain.budget < context):
        spent = forms_spent(model, plain, limit, context, batch, cost)
    fitting = [one for one in spent if one.budget is not None]
    if not fitting:
        one = min(spent, key=lambda one: one.least)
        raise ValueError(
            f"memory={shown(memory)} ({one.limit} bytes) is too little for batch={batch} of {type(model).__name__} "
            f"under {slug}: {one.least} bytes is the least ({one.fixed} of them whatever is kept)"
        )
    chosen = min(fitting, key=lambda one: one.harm)
    assert chosen.budget is not None
    return with_budget_of(chosen.method, chosen.budget)


def spend(method: Method, limit: int | float, batch: int, cost: Cost) -> Spent:
    """What a limit buys of a method as it is; its harm is not known."""
    low = least_of(method)
    costs, dense = cost(with_budget_of(method, max(low, LITTLE)))
    most = int(limit * dense * batch) if isinstance(limit, float) else limit
    least, row = costs.of(method, low), (most - costs.once) // batch
    budget = costs.most(method, low, row) if least <= row else None
    return Spent(method, most, budget, inf, costs.once + batch * least, costs.once + batch * costs.fixed)


def forms_spent(
    model: PreTrainedModel, plain: Spent, limit: int | float, context: int, batch: int, cost: Cost
) -> list[Spent]:
    """What it buys in each format that goes with the method and the model, the method alone among them."""
    harm, found = harm_of(model), list[Spent]()
    for form in choices(model, plain.method, harm):
        try:
            one = plain if form == PLAIN else spend(with_form(plain.method, form), limit, batch, cost)
        except ValueError:  # a format that this model's heads, or this method, can't have: the others are there
            continue
        share = 0.0 if one.budget is None else min(1.0, one.budget / context)
        found.append(replace(one, harm=harm.of(form, share)) if share else one)
    return found


def taker(method: Method) -> Method:
    """The one stage that a budget bounds, prompt and generation. Raises ValueError where there is none."""
    taking = keeping(stages_of(method))
    if len(taking) != 1:
        named = "none" if not taking else " and ".join(stage.info.slug for stage in taking)
        raise ValueError(f"memory= sets the budget of one stage of {method}, and {named} has one")
    stage: Method = taking[0]
    if (given := taking[0].budget) != stage.info.options["budget"]:
        raise ValueError(f"memory= sets the budget of {stage.info.slug}, and budget={given!r} is given, too")
    if held := [event for event in ("after_prompt", "after_forward") if stage.listens(event)]:
        raise ValueError(
            f"memory= needs a method that cuts a prompt layer by layer; {stage} holds all of it until {held[0]}"
        )
    if not (stage.listens("after_decode") or stage.period):
        raise ValueError(
            f"memory= needs a method that keeps to its budget while it generates, which {stage} does not{_hint(method)}"
        )
    return stage


def _hint(method: Method) -> str:
    """What would be one, where that can be said."""
    stages = stages_of(method)
    if firm := [form for form in formats_of(stages) if not form.traits.drops]:
        return f": {firm[0]} drops no single tokens (requantise=True, where it has that, or a format by token)"
    if any(getattr(stage, "interval", None) == 0 for stage in stages):
        return ": its interval is 0"
    slug = keeping(stages)[0].info.slug
    try:
        parse("decoding", score=slug)
    except ValueError:
        return ""
    return f": try decoding({slug})"


def least_of(method: Method) -> int:
    """The smallest budget in tokens that the method's other options leave room for."""
    for budget in count(1):
        try:
            with_budget_of(method, budget)
        except ValueError:
            if budget > MANY:
                raise
        else:
            return budget
    raise AssertionError("count() ends")
