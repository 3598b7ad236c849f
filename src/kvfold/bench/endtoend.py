"""A model end to end: seconds of a decode step and of a prefill, and bytes, cache beside cache in one run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.bench import contenders as c
from kvfold.bench.beside import BusyLoops
from kvfold.bench.lanes import CacheLane, Lane, Rounds, can_profile, floors
from kvfold.bench.machine import ReadRate, Spread, spread
from kvfold.bench.parts import StepParts
from kvfold.bench.peers import PeerLane

WARM_TOKENS, WARM_STEPS = 256, 2
"""Of the untimed turn that comes first: kernels are compiled, buffers allocated."""
READS = 5
"""Plain reads after each round: rounds are few here, and the bandwidth is their median."""
PROFILED = 3
"""Steps of each cache after a round that say where their time goes; they are in no other number."""


@dataclass(frozen=True)
class DecodeTimes:
    """Decode steps of a batch. Bytes and kept tokens are those right after the prompt, before the first step.

    `bound_seconds` is the least time of a step: weights and KV bytes read once at the measured bandwidth. `speedup`
    is DynamicCache's step over this one, round by round, `bound_speedup` what their bounds allow; `of_bound` the bound
    over the step. `floor_seconds` is the same step with a cache that holds next to nothing, in the same rounds, and
    `floor_bound_seconds` the weights' share of the bound; `parts` says where the time of a step goes, on a CPU.
    `times_peers`: each peer's step over this one, round by round. `beside_seconds` is a step beside busy programs, in
    the same rounds, `keeps` the share of its own speed that is left.
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
    speedup: Spread
    bound_speedup: float
    floor_seconds: float | None
    floor_bound_seconds: float
    parts: StepParts | None
    times_peers: dict[str, Spread]
    beside_seconds: Spread | None
    keeps: Spread | None


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
    """One cache, or one peer that took its turns in a process of its own; what was not measured is None.

    `peer` is what that process says of itself: versions, peak memory, its command.
    """

    contender: str
    library: str
    budget: float | int | None
    separate_process: bool = False
    decode: DecodeTimes | None = None
    prefill: Prefill | None = None
    memory: dict[str, Any] | None = None
    peer: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def measure_decode(
    model: PreTrainedModel, entrants: Sequence[c.BenchContender], ids: Tensor, *, steps: int, rounds: int,
    rate: ReadRate, peers: Sequence[PeerLane] = (), loops: BusyLoops | None = None,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, DecodeTimes]:  # fmt: skip
    """Greedy steps of every contender after one shared prefill of `ids` (B, T), by name; DynamicCache must be in.

    In a round each takes `steps` steps, one cache after the other, peers and empty caches too, and as many while
    `loops` are busy; the caches go on growing from round to round. A peer that fails is left out and says why.
    """
    b, t = ids.shape
    caches = [contender.make() for contender in entrants]
    tick(f"one prefill of {b} x {t} tokens for {len(caches)} caches")
    first = c.fill_all(model, caches, ids)
    lanes = [CacheLane(model, one, cache, first) for one, cache in zip(entrants, caches, strict=True)]
    del caches
    for peer in peers:
        tick(f"prefill of {b} x {t} tokens: {peer.name}")
        peer.fill()
    empty = floors(model, entrants, ids)
    played, crowded = Rounds([*lanes, *empty, *peers]), Rounds([*lanes, *peers])
    for turn in range(rounds + 1):  # the first warms up
        ticking = f"decode round {turn} of {rounds}: "
        played.play(steps if turn else WARM_STEPS, keep=turn > 0, tick=lambda name, so=ticking: tick(so + name))  # type: ignore[misc]
        if turn and loops is not None:
            with loops.running():
                crowded.play(steps, tick=lambda name, so=ticking: tick(f"{so}{name}, beside others"))  # type: ignore[misc]
        if turn:
            rate.sample(READS)
            for cached in lanes if can_profile(model) else ():
                cached.profiled(PROFILED)
    dense = next(cached for cached in lanes if cached.name == c.DYNAMIC)
    floor = {each.library: played.steps(each).median for each in empty}
    well = [peer for peer in peers if peer.failed is None]
    weights, bandwidth = c.weight_bytes(model), rate.bytes_per_second
    found = {}
    everyone: list[Lane] = [*lanes, *well]
    for lane in everyone:
        step, least = played.steps(lane), (weights + lane.kv_bytes) / bandwidth
        own = lane if isinstance(lane, CacheLane) else None
        found[lane.name] = DecodeTimes(
            batch=b, context=t, step_seconds=step, round_seconds=tuple(played.medians(lane)),
            tokens_per_second=b / step.median, kv_bytes=lane.kv_bytes, kv_ratio=lane.kv_bytes / dense.kv_bytes,
            kept_tokens=None if own is None else own.kept, bound_seconds=least, bound_tokens_per_second=b / least,
            of_bound=least / step.median, speedup=played.ratio(dense, lane),
            bound_speedup=(weights + dense.kv_bytes) / bandwidth / least,
            floor_seconds=None if own is None else floor.get(own.contender.library),
            floor_bound_seconds=weights / bandwidth, parts=None if own is None else own.parts(),
            times_peers={peer.name: played.ratio(peer, lane) for peer in well if peer is not lane},
            beside_seconds=None if loops is None else crowded.steps(lane),
            keeps=None if loops is None else played.over(crowded, lane),
        )  # fmt: skip
    return found


def measure_prefill(
    model: PreTrainedModel, entrants: Sequence[c.BenchContender], ids: Tensor, *, rounds: int,
    rate: ReadRate | None = None, peers: Sequence[PeerLane] = (), tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Prefill]:  # fmt: skip
    """Each contender reads `ids` (B, T) into a new cache, in turns, by name; DynamicCache must be in.

    On CUDA also the most bytes that were allocated meanwhile: weights, activations and the cache.
    """
    names = [one.name for one in entrants] + [peer.name for peer in peers]
    taken: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int | None] = dict.fromkeys(taken)
    for turn in range(rounds + 1):  # the first warms up
        short = ids if turn else ids[:, :WARM_TOKENS]
        for contender in entrants:
            tick(f"prefill round {turn} of {rounds}: {contender.name}")
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            cache = contender.make()
            _, seconds = c.read_prompt(model, cache, short)
            del cache
            if turn:
                taken[contender.name].append(seconds)
                if model.device.type == "cuda":
                    peaks[contender.name] = torch.cuda.max_memory_allocated(model.device)
        for peer in peers:
            tick(f"prefill round {turn} of {rounds}: {peer.name}")
            found = peer.read(*short.shape)
            if turn and found is not None:
                taken[peer.name].append(found)
        if turn and rate is not None:
            rate.sample(READS)
    failed = {peer.name for peer in peers if peer.failed is not None}
    medians = {name: spread(seconds) for name, seconds in taken.items() if name not in failed}
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
    prefill_batch: int = 1, seed: int = 0, rate: ReadRate | None = None, peers: Sequence[PeerLane] = (),
    loops: BusyLoops | None = None, tick: Callable[[str], None] = lambda _: None,
) -> tuple[list[RunRow], ReadRate]:  # fmt: skip
    """Prefill (unless `prefill_batch` is 0), then decode: a row for each contender, in their order, then for each peer.

    Prompts are random token ids; decoding is measured beside busy `loops`, too. Raises ValueError if DynamicCache,
    which the others are measured by, is missing.
    """
    if c.DYNAMIC not in {contender.name for contender in entrants}:
        raise ValueError(f"entrants={[contender.name for contender in entrants]} must hold {c.DYNAMIC}")
    rate = rate or ReadRate(model.device)
    read: dict[str, Prefill] = {}
    if prefill_batch:
        prompts = c.draw_prompts(model, prefill_batch, context, seed)
        read = measure_prefill(model, entrants, prompts, rounds=rounds, rate=rate, peers=peers, tick=tick)
    prompts = c.draw_prompts(model, batch, context, seed)
    decoded = measure_decode(
        model, entrants, prompts, steps=steps, rounds=rounds, rate=rate, peers=peers, loops=loops, tick=tick
    )
    rows = [
        RunRow(one.name, one.library, one.budget, decode=decoded[one.name], prefill=read.get(one.name))
        for one in entrants
    ]
    for peer in peers:
        said = peer.report()
        if said is not None:
            own = {"decode": decoded[peer.name], "prefill": read.get(peer.name), "peer": said}
            rows.append(RunRow(peer.method, peer.library, peer.budget, separate_process=True, **own))  # type: ignore[arg-type]
    return rows, rate
