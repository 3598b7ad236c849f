"""A model end to end: seconds of a decode step and of a prefill, and bytes, cache beside cache in one run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as HFCache
from transformers import PreTrainedModel

from kvfold.bench import contenders as c
from kvfold.bench.machine import ReadRate, Spread, spread
from kvfold.hf.cache import Cache

WARM_TOKENS, WARM_STEPS = 256, 2
"""Of the untimed turn that comes first: kernels are compiled, buffers allocated."""
READS = 5
"""Plain reads after each round: rounds are few here, and the bandwidth is their median."""


@dataclass(frozen=True)
class Decoding:
    """Decode steps of a batch. Bytes and kept tokens are those right after the prompt, before the first step.

    `bound_seconds` is the least time of a step: weights and KV bytes read once at the measured bandwidth. `speedup`
    is DynamicCache's step over this one, `bound_speedup` what their bounds allow; `of_bound` the bound over the step.
    """

    batch: int
    context: int
    step_seconds: Spread
    round_seconds: tuple[float, ...]
    tokens_per_second: float
    kv_bytes: int
    kv_ratio: float
    kept_tokens: float | None
    bound_seconds: float
    bound_tokens_per_second: float
    of_bound: float
    speedup: float
    bound_speedup: float


@dataclass(frozen=True)
class Prefill:
    """A prompt read into a new cache. `ratio_full` is over method `full`'s seconds: what scoring and evicting add."""

    batch: int
    context: int
    seconds: Spread
    tokens_per_second: float
    ratio_dynamic: float
    ratio_full: float | None
    peak_cuda_bytes: int | None


@dataclass(frozen=True)
class RunRow:
    """One cache, or one peer that ran in a process of its own; what was not measured is None."""

    contender: str
    library: str
    budget: float | int | None
    separate_process: bool = False
    decode: Decoding | None = None
    prefill: Prefill | None = None
    memory: dict[str, Any] | None = None
    peer: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass
class _Lane:
    """A contender's cache in the decode rounds: what it held first, where it stands, what its steps took."""

    contender: c.BenchContender
    cache: HFCache
    kv_bytes: int
    kept: float | None
    token: Tensor
    rounds: list[list[float]]


def measure_decode(
    model: PreTrainedModel, entrants: Sequence[c.BenchContender], ids: Tensor, *, steps: int, rounds: int,
    rate: ReadRate, tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Decoding]:  # fmt: skip
    """Greedy steps of every contender after one shared prefill of `ids` (B, T), by name; DynamicCache must be in.

    In a round each takes `steps` steps, one cache after the other; the caches go on growing from round to round.
    """
    b, t = ids.shape
    caches = [contender.make() for contender in entrants]
    tick(f"one prefill of {b} x {t} tokens for {len(caches)} caches")
    first = c.fill_all(model, caches, ids)
    lanes = [
        _Lane(one, cache, c.held_bytes(cache), cache.kept_tokens if isinstance(cache, Cache) else None, first, [])
        for one, cache in zip(entrants, caches, strict=True)
    ]
    del caches
    for turn in range(rounds + 1):  # the first warms up
        for lane in lanes:
            tick(f"decode round {turn} of {rounds}: {lane.contender.name}")
            lane.token, taken = c.decode_steps(model, lane.cache, lane.token, steps if turn else WARM_STEPS)
            if turn:
                lane.rounds.append(taken)
        if turn:
            rate.sample(READS)
    dense = next(lane for lane in lanes if lane.contender.name == c.DYNAMIC)
    weights = c.weight_bytes(model)

    def bound(lane: _Lane) -> float:
        return (weights + lane.kv_bytes) / rate.bytes_per_second

    def took(lane: _Lane) -> Spread:
        return spread([second for taken in lane.rounds for second in taken])

    found = {}
    for lane in lanes:
        step, least = took(lane), bound(lane)
        found[lane.contender.name] = Decoding(
            batch=b, context=t, step_seconds=step,
            round_seconds=tuple(spread(taken).median for taken in lane.rounds),
            tokens_per_second=b / step.median, kv_bytes=lane.kv_bytes, kv_ratio=lane.kv_bytes / dense.kv_bytes,
            kept_tokens=lane.kept, bound_seconds=least, bound_tokens_per_second=b / least,
            of_bound=least / step.median, speedup=took(dense).median / step.median, bound_speedup=bound(dense) / least,
        )  # fmt: skip
    return found


def measure_prefill(
    model: PreTrainedModel, entrants: Sequence[c.BenchContender], ids: Tensor, *, rounds: int,
    rate: ReadRate | None = None, tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Prefill]:  # fmt: skip
    """Each contender reads `ids` (B, T) into a new cache, in turns, by name; DynamicCache must be in.

    On CUDA also the most bytes that were allocated meanwhile: weights, activations and the cache.
    """
    taken: dict[str, list[float]] = {contender.name: [] for contender in entrants}
    peaks: dict[str, int | None] = dict.fromkeys(taken)
    for turn in range(rounds + 1):  # the first warms up
        for contender in entrants:
            tick(f"prefill round {turn} of {rounds}: {contender.name}")
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            cache = contender.make()
            _, seconds = c.read_prompt(model, cache, ids if turn else ids[:, :WARM_TOKENS])
            del cache
            if turn:
                taken[contender.name].append(seconds)
                if model.device.type == "cuda":
                    peaks[contender.name] = torch.cuda.max_memory_allocated(model.device)
        if turn and rate is not None:
            rate.sample(READS)
    medians = {name: spread(seconds) for name, seconds in taken.items()}
    full = next((medians[e.name].median for e in entrants if e.name == "full"), None)
    return {
        name: Prefill(
            batch=ids.shape[0], context=ids.shape[1], seconds=seconds, tokens_per_second=ids.numel() / seconds.median,
            ratio_dynamic=seconds.median / medians[c.DYNAMIC].median,
            ratio_full=None if full is None else seconds.median / full, peak_cuda_bytes=peaks[name],
        )
        for name, seconds in medians.items()
    }  # fmt: skip


def measure_run(
    model: PreTrainedModel, entrants: Sequence[c.BenchContender], *, context: int, batch: int, steps: int, rounds: int,
    prefill_batch: int = 1, seed: int = 0, rate: ReadRate | None = None, tick: Callable[[str], None] = lambda _: None,
) -> tuple[list[RunRow], ReadRate]:  # fmt: skip
    """Prefill (unless `prefill_batch` is 0), then decode: a row for each contender, in their order.

    Prompts are random token ids. Raises ValueError if DynamicCache, which the others are measured by, is missing.
    """
    if c.DYNAMIC not in {contender.name for contender in entrants}:
        raise ValueError(f"entrants={[contender.name for contender in entrants]} must hold {c.DYNAMIC}")
    rate = rate or ReadRate(model.device)
    read: dict[str, Prefill] = {}
    if prefill_batch:
        prompts = c.draw_prompts(model, prefill_batch, context, seed)
        read = measure_prefill(model, entrants, prompts, rounds=rounds, rate=rate, tick=tick)
    prompts = c.draw_prompts(model, batch, context, seed)
    decoded = measure_decode(model, entrants, prompts, steps=steps, rounds=rounds, rate=rate, tick=tick)
    rows = [
        RunRow(one.name, one.library, one.budget, decode=decoded[one.name], prefill=read.get(one.name))
        for one in entrants
    ]
    return rows, rate
