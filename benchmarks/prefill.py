"""What reading a prompt takes: seconds, seconds a token, and memory, as it grows and beside transformers.

    python benchmarks/prefill.py growth --model gemma3-270m --context 4096,25932 --ways parts,once,chunks=1024
    python benchmarks/prefill.py beside --model smollm2-135m-instruct --methods full,snapkv,h2o --rounds 7
    python benchmarks/prefill.py same --model gemma3-270m --context 4096,8192 --methods kvfold,snapkv

`growth`: each way at each length in a process of its own, which loads the model, reads 1,100 tokens, sets the mark of
its memory back and reads random tokens. Ways: `parts` (what a cache does by itself) or `parts=N` tokens, `once` (all at
once), `chunks=N` (the model is called for each N tokens; exact for `full`), `transformers` (DynamicCache and SDPA).
Memory is the most that was resident beyond the loaded model and the cache as it is when all is read.

`beside`: transformers' DynamicCache with SDPA and each method read the same prompt in turns, in one process. Prints the
median of the ratios of each turn, with the 95 % bootstrap interval: of `full` over DynamicCache, of others over `full`.
CPU seconds of all threads stand beside, for machines that others use too.

`same`: each method reads a prompt in parts and at once: seconds of both, whether the same tokens are kept and the same
answer of 16 tokens is given, and how far the logits of its first are apart.
"""

import argparse
import json
import os
import sys
import time
from statistics import median
from typing import Any

import numpy as np
import torch

from kvfold.bench import contenders
from kvfold.bench.peak import high_water, run_json, set_back, trim
from kvfold.evaluation.compare import split_names
from kvfold.evaluation.decoding import decode, prefill
from kvfold.evaluation.memory import resident_bytes
from kvfold.evaluation.statistics import resampled_indices
from kvfold.hf.cache import Cache
from kvfold.models.load import load

WARM = 1100
"""Tokens that are read before anything counts: longer than a part."""


def read_once(model_name: str, method: str, context: int, way: str, threads: int, dtype: str | None) -> dict[str, Any]:
    """One prompt in this process: seconds and bytes."""
    torch.set_num_threads(threads)
    model, _ = load(model_name, dtype=dtype, progress=False)
    kind, _, number = way.partition("=")
    entrants, _ = contenders.transformers_contenders(model, quantized=False)
    size = {"parts": int(number) if number else None, "once": 0, "chunks": 0}.get(kind)

    def make() -> Any:
        return entrants[0].make() if kind == "transformers" else Cache(model, method, part_size=size)

    ids = contenders.draw_prompts(model, 1, context)
    contenders.set_attention(model, make())
    prefill(model, ids[:, :WARM], make())
    trim()
    before, back = resident_bytes(), set_back()
    cache = make()
    processor = time.process_time()
    read = prefill(model, ids, cache, int(number) if kind == "chunks" else None)
    processor, most, held = time.process_time() - processor, high_water(), contenders.held_bytes(cache)
    beyond = None if most is None or before is None or not back else most - before - held
    return {
        "way": way, "method": method, "context": context, "seconds": read.seconds, "cpu_seconds": processor,
        "ms_per_token": 1000 * read.seconds / context, "cpu_ms_per_token": 1000 * processor / context,
        "kv_bytes": held, "beyond_bytes": beyond, "next": int(read.logits.argmax()),
    }  # fmt: skip


def growth(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print(
        f"{'way':>14} {'tokens':>7} {'s':>7} {'ms/token':>9} {'CPU ms/token':>13} {'KV MB':>6} {'beyond MB':>10}  next"
    )
    for context in map(int, given.context.split(",")):
        for way in given.ways.split(","):
            one = [given.model, given.method, context, way, given.threads, given.dtype]
            row = run_json([sys.executable, __file__, "one", json.dumps(one)], way)
            beyond = "-" if row["beyond_bytes"] is None else f"{row['beyond_bytes'] / 1e6:.0f}"
            print(
                f"{way:>14} {context:>7} {row['seconds']:>7.1f} {row['ms_per_token']:>9.2f} "
                f"{row['cpu_ms_per_token']:>13.2f} {row['kv_bytes'] / 1e6:>6.0f} {beyond:>10}  {row['next']}",
                flush=True,
            )
            rows.append(row)
    return rows


def beside(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    model, _ = load(given.model, dtype=given.dtype, progress=False)
    from kvfold.methods import parse

    entrants, _ = contenders.transformers_contenders(model, quantized=False)
    entrants += contenders.kvfold_contenders(model, [(name, parse(name)) for name in split_names(given.methods)])
    ids = contenders.draw_prompts(model, 1, given.context)
    taken: dict[str, list[tuple[float, float]]] = {entrant.name: [] for entrant in entrants}
    for turn in range(given.rounds + 1):
        for entrant in entrants[turn % len(entrants) :] + entrants[: turn % len(entrants)]:
            processor = time.process_time()
            _, seconds = contenders.read_prompt(model, entrant.make(), ids)
            print(f"  turn {turn}: {entrant.name} {seconds:.2f} s", file=sys.stderr, flush=True)
            if turn:  # the first warms up
                taken[entrant.name].append((seconds, time.process_time() - processor))
    rows = []
    print(f"{given.context} tokens, {given.rounds} turns, {given.threads} threads")
    for entrant in entrants:
        base = entrants[0].name if entrant.name in (entrants[0].name, "full") else "full"
        ratios = np.array(taken[entrant.name]) / np.array(taken[base])
        row: dict[str, Any] = {"contender": entrant.name, "over": base}
        for column, name in enumerate(("seconds", "cpu_seconds")):
            drawn = np.concatenate(
                [np.median(ratios[drawn_rows, column], 1) for drawn_rows in resampled_indices(len(ratios))]
            )
            low, high = np.percentile(drawn, [2.5, 97.5])
            row |= {name: median(np.array(taken[entrant.name])[:, column]), f"{name}_ratio": median(ratios[:, column])}
            row |= {f"{name}_interval": [float(low), float(high)]}
        print(
            f"{entrant.name:>14} {row['seconds']:6.2f} s, {row['seconds_ratio']:.3f} {_range(row['seconds_interval'])} "
            f"of {base}'s; CPU {row['cpu_seconds']:6.2f} s, {row['cpu_seconds_ratio']:.3f} "
            f"{_range(row['cpu_seconds_interval'])}",
            flush=True,
        )
        rows.append(row)
    return rows


def same(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    model, _ = load(given.model, dtype=given.dtype, progress=False)
    for context in map(int, given.context.split(",")):
        ids = contenders.draw_prompts(model, 1, context)
        for method in split_names(given.methods):
            reads, kept, said = [], [], []
            for size in (None, 0):
                cache = Cache(model, method, part_size=size)
                reads.append(prefill(model, ids, cache))
                kept.append([cache.kept(core.layer) for core in cache.paged])
                said.append(decode(model, cache, reads[-1].logits, 16).tokens)
            apart = float((reads[0].logits - reads[1].logits).abs().max())
            alike = f"same tokens kept: {kept[0] == kept[1]}, same answer: {said[0] == said[1]}"
            print(
                f"{context} tokens, {method}: {reads[0].seconds:.1f} s in parts, {reads[1].seconds:.1f} s at once; "
                f"{alike}, logits within {apart:.1e}",
                flush=True,
            )


def _range(ends: list[float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(read_once(*json.loads(sys.argv[2]))), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["growth", "beside", "same"])
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--method", default="kvfold", help="of `growth`")
    parser.add_argument("--methods", default="full,kvfold,h2o", help="of `beside`, `full` first; of `same`")
    parser.add_argument("--context", default="4096", help="tokens; of all but `beside` several, separated by commas")
    parser.add_argument("--ways", default="parts,once,chunks=1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype")
    given = parser.parse_args()
    if given.what == "growth":
        growth(given)
    elif given.what == "same":
        same(given)
    else:
        given.context = int(given.context)
        beside(given)


if __name__ == "__main__":
    main()
