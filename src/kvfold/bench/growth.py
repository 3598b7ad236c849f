"""How cost grows with the text: seconds and bytes as the context doubles, and the exponent between neighbours.

Each cache reads its prompts first, the shortest first; then those of all contexts take turns to decode, so that what
else a machine does slows the long ones as it slows the short ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import log2
from typing import Any

from transformers import PreTrainedModel

from kvfold.bench import contenders as c
from kvfold.bench.endtoend import READS, WARM_STEPS, WARM_TOKENS
from kvfold.bench.lanes import CacheLane, Rounds
from kvfold.bench.machine import ReadRate, Spread, spread

MEASURES = ("step_seconds", "prefill_seconds", "kv_bytes")


@dataclass(frozen=True)
class GrowthRow:
    """One cache at one context. `kv_bytes` right after the prompt; a bound reads weights and KV bytes once.

    `of_first` is the step over that of the same cache at the shortest context, round by round.
    """

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
    of_first: Spread

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
    steps: int = 12, rounds: int = 2, prefills: int = 1, seed: int = 0, rate: ReadRate | None = None,
    tick: Callable[[str], None] = lambda _: None,
) -> tuple[list[GrowthRow], ReadRate]:  # fmt: skip
    """A row for each context (ascending) and contender: `prefills` prompts of (B, T), then rounds of `steps` tokens.

    In a round the caches of all contexts take their steps, one after the other.
    """
    rate = rate or ReadRate(model.device)
    reads: dict[str, list[float]] = {}
    lanes: dict[tuple[str, int], CacheLane] = {}
    for one in entrants:
        cache = one.make()
        token, _ = c.read_prompt(model, cache, c.draw_prompts(model, batch, min(WARM_TOKENS, contexts[0]), seed))
        c.decode_steps(model, cache, token, WARM_STEPS)
    for context in contexts:
        ids = c.draw_prompts(model, batch, context, seed)
        for turn in range(prefills):
            for one in entrants:
                tick(f"{context} tokens, prompt {turn + 1} of {prefills}: {one.name}")
                lanes.pop((one.name, context), None)
                cache = one.make()
                token, seconds = c.read_prompt(model, cache, ids)
                lane = lanes[one.name, context] = CacheLane(model, one, cache, token, f"{one.name}, {context} tokens")
                reads.setdefault(lane.name, []).append(seconds)
                del cache
            rate.sample(READS)
    played = Rounds([*lanes.values()])
    for turn in range(rounds + 1):  # the first warms up
        so = f"round {turn} of {rounds}: "
        played.play(steps if turn else WARM_STEPS, keep=turn > 0, tick=lambda name, so=so: tick(so + name))  # type: ignore[misc]
        if turn:
            rate.sample(READS)
    weights, rows = c.weight_bytes(model), []
    for context in contexts:
        for one in entrants:
            lane, first = lanes[one.name, context], lanes[one.name, contexts[0]]
            bound, step = (weights + lane.kv_bytes) / rate.bytes_per_second, played.steps(lane)
            rows.append(
                GrowthRow(
                    one.name, one.library, one.budget, context, batch, step, spread(reads[lane.name]), lane.kv_bytes,
                    bound, bound / step.median, played.ratio(lane, first),
                )
            )  # fmt: skip
    return rows, rate


def flat_lines(rows: Sequence[GrowthRow]) -> list[str]:
    """How far each cache's step and bytes are from those at the shortest context, a line a cache."""
    lines = []
    for name in dict.fromkeys(row.contender for row in rows):
        own = sorted((row for row in rows if row.contender == name), key=lambda row: row.context)
        steps, sizes = [row.of_first.median for row in own], [row.kv_bytes / own[0].kv_bytes for row in own]
        lines.append(
            f"{name}, from {own[0].context:,} to {own[-1].context:,} tokens: a step takes {min(steps):.2f} to "
            f"{max(steps):.2f} of the first, and holds {min(sizes):.2f} to {max(sizes):.2f} of its bytes"
        )
    return lines


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
