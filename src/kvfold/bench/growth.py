"""How cost grows with the text: seconds and bytes as the context doubles, and the exponent between neighbours."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import log2
from typing import Any

from transformers import PreTrainedModel

from kvfold.bench import contenders as c
from kvfold.bench.endtoend import READS, WARM_STEPS, WARM_TOKENS
from kvfold.bench.machine import ReadRate, Spread, spread

MEASURES = ("step_seconds", "prefill_seconds", "kv_bytes")


@dataclass(frozen=True)
class GrowthRow:
    """One cache at one context. `kv_bytes` right after the prompt; a bound reads weights and KV bytes once."""

    contender: str
    library: str
    budget: float | int | None
    context: int
    batch: int
    step_seconds: Spread
    prefill_seconds: Spread
    kv_bytes: int
    bound_seconds: float
    of_bound: float

    def amount(self, measure: str) -> float:
        """One of MEASURES as a number, a median where there are several."""
        found = getattr(self, measure)
        return found.median if isinstance(found, Spread) else float(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Exponent:
    """Between two contexts of one cache the measure grows as T ** exponent: 1.0 linearly, 0.0 not at all."""

    contender: str
    measure: str
    start: int
    stop: int
    exponent: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def measure_growth(
    model: PreTrainedModel, entrants: Sequence[c.BenchContender], contexts: Sequence[int], *, batch: int = 1,
    steps: int = 12, rounds: int = 2, seed: int = 0, rate: ReadRate | None = None,
    tick: Callable[[str], None] = lambda _: None,
) -> tuple[list[GrowthRow], ReadRate]:  # fmt: skip
    """A row for each context and contender: in a round each reads a prompt of (B, T) and decodes `steps` tokens."""
    rate = rate or ReadRate(model.device)
    taken: list[tuple[int, c.BenchContender, list[float], list[float], int]] = []
    for number, context in enumerate(contexts):
        ids = c.draw_prompts(model, batch, context, seed)
        reads: dict[str, list[float]] = {one.name: [] for one in entrants}
        made: dict[str, list[float]] = {one.name: [] for one in entrants}
        held: dict[str, int] = {}
        for turn in range(0 if number == 0 else 1, rounds + 1):  # turn 0 warms up
            for one in entrants:
                tick(f"{context} tokens, round {turn} of {rounds}: {one.name}")
                cache = one.make()
                token, seconds = c.read_prompt(model, cache, ids if turn else ids[:, :WARM_TOKENS])
                held[one.name] = c.held_bytes(cache)
                _, each = c.decode_steps(model, cache, token, steps if turn else WARM_STEPS)
                del cache
                if turn:
                    reads[one.name].append(seconds)
                    made[one.name] += each
            if turn:
                rate.sample(READS)
        taken += [(context, one, reads[one.name], made[one.name], held[one.name]) for one in entrants]
    weights, rows = c.weight_bytes(model), []
    for context, one, read, step, nbytes in taken:
        bound, median = (weights + nbytes) / rate.bytes_per_second, spread(step)
        rows.append(
            GrowthRow(
                one.name, one.library, one.budget, context, batch, median, spread(read), nbytes, bound,
                bound / median.median,
            )
        )  # fmt: skip
    return rows, rate


def exponents(rows: Sequence[GrowthRow]) -> list[Exponent]:
    """The growth of every measure of every contender between neighbouring contexts."""
    by_name: dict[str, list[GrowthRow]] = {}
    for row in rows:
        by_name.setdefault(row.contender, []).append(row)
    return [
        Exponent(
            name, measure, a.context, b.context,
            log2(b.amount(measure) / a.amount(measure)) / log2(b.context / a.context),
        )
        for name, own in by_name.items()
        for measure in MEASURES
        for a, b in pairwise(sorted(own, key=lambda row: row.context))
    ]  # fmt: skip
