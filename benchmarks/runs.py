"""Where the pages of a cache lie after real use, and what that costs a decode step's attention.

    python benchmarks/runs.py --json runs.json
    python benchmarks/runs.py --growth --batch 8

A random Llama of a few layers (what pools do depends on shapes and methods, not on weights; the heads are SmolLM2's)
reads random prompts and decodes. `steady`: one batch, one prompt length, some hundred steps. `rows`: rows retire, new
ones of other lengths join, in a pool of the cache's own; `arena`: the same where all caches share an arena with little
room to spare. Printed for each: the share of pages that lie in runs of at least 64 KB (page numbers that follow each
other in a row; bytes of the keys alone) or in a shorter row that is one run, the mean run, and GB/s of keys and values:
the decode attention's over these pages, over the same tokens in a fresh cache, and a plain read's of the same pages in
the same order, all in turns.

`--growth` asks no model: random tokens are stored in so many layers, and steps are timed as they grow, the copying of
pools that must grow included; `ragged` rows hold a fifth of the tokens, more or less.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvfold
from kvfold.bench.machine import describe, timed
from kvfold.formats import POSITION, Chunk, Dense, Segment, Spec
from kvfold.pages import Arena, PageTable

RUN_BYTES, HEADS, GROUP, SIZE, CPU = 1 << 16, 3, 3, 64, torch.device("cpu")


def build(layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A random model whose attention has SmolLM2's shape, and little else."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=HEADS * GROUP * SIZE, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=HEADS * GROUP, num_key_value_heads=HEADS, max_position_embeddings=16384,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def read_prompt(model: PreTrainedModel, cache: Any, batch: int, length: int, seed: int) -> None:
    """A random prompt, in one forward."""
    ids = torch.randint(10, 500, (batch, length), generator=torch.Generator().manual_seed(seed))
    model(ids, past_key_values=cache, logits_to_keep=1)


def step(model: PreTrainedModel, cache: Any) -> None:
    """A token a row; a row that has read less has padding in front."""
    width, seen = cache.get_seq_length() + 1, torch.from_numpy(cache.rows.seen)[:, None] + 1
    mask = (torch.arange(width) >= width - seen).long()
    token = torch.randint(10, 500, (len(seen), 1), generator=torch.Generator().manual_seed(width))
    model(token, past_key_values=cache, attention_mask=mask, position_ids=seen - 1)


def steady(model: PreTrainedModel, method: str, args: argparse.Namespace) -> Any:
    """One batch that reads one prompt and decodes."""
    cache = kvfold.Cache(model, method)
    read_prompt(model, cache, args.batch, args.context, 0)
    for _ in range(args.steps):
        step(model, cache)
    return cache


def turnover(model: PreTrainedModel, method: str, args: argparse.Namespace, arena: Arena | None = None) -> Any:
    """Rows of random lengths that come and go; each stays for about as many steps as there are rows times ten."""
    draw, cache = random.Random(0), kvfold.Cache(model, method, arena=arena)
    for number in range(args.batch + args.changes):
        while cache.rows.batch >= args.batch:
            cache.retire([draw.randrange(cache.rows.batch)])
        new = kvfold.Cache(model, method, arena=arena)
        read_prompt(model, new, 1, draw.randint(args.context // 6, args.context), number)
        cache.join(new)
        for _ in range(draw.randint(1, 20)):
            step(model, cache)
    return cache


def tables(segment: Segment) -> list[PageTable]:
    """The page tables of a segment."""
    return [part.table for part in getattr(segment, "parts", [segment])]


def segments(cache: Any) -> list[Segment]:
    """All that hold tokens."""
    return [segment for core in cache.paged for _, segment in core.segments if segment.longest]


def runs(table: PageTable) -> tuple[np.ndarray, int]:
    """Pages of each run of a row's pages, those alone that hold tokens, and pages in runs that are long enough."""
    found, enough = [], -(-RUN_BYTES // table.pool.specs["keys"].page_nbytes(table.pool.page_size))
    for row, pages in zip(table.table, table.needed, strict=True):
        held = row[:pages].astype(np.int64)
        ends = np.flatnonzero(np.diff(held, append=-9) != 1)
        found.append(np.diff(ends, prepend=-1))
    good = sum(int(lengths[(lengths >= enough) | (len(lengths) == 1)].sum()) for lengths in found)
    return np.concatenate(found), good


def shares(cache: Any) -> dict[str, float]:
    """Of all pages, those in runs that are long enough; bytes of a mean run."""
    long = total = count = 0
    for segment in segments(cache):
        for table in tables(segment):
            page, (lengths, good) = table.pool.specs["keys"].page_nbytes(table.pool.page_size), runs(table)
            long, total, count = long + good * page, total + int(lengths.sum()) * page, count + len(lengths)
    return {"in_runs": long / total, "mean_run": total / count, "nbytes": cache.nbytes}


def fresh(segment: Segment) -> Segment:
    """The same tokens in a pool of their own, each row's pages side by side."""
    tokens = segment.dense()
    copy = Dense().open(Spec.of(tokens))
    copy.append(Chunk(tokens.keys, tokens.values, tokens.valid, dict(tokens.columns)))
    return copy


def plain_read(table: PageTable) -> Callable[[], list[Tensor]]:
    """Adds up a table's pages of keys and values in the order of the table, a row to a thread at a time."""
    held = np.arange(table.table.shape[1])[None] < table.needed[:, None]
    pages = torch.from_numpy(table.table[held].astype(np.int64))
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(table.needed)[:-1]]).astype(np.int64))
    planes = [table.pool.planes[name].flatten(1) for name in ("keys", "values")]
    return lambda: [embedding_bag(pages, plane, starts, mode="sum") for plane in planes]


def rates(cache: Any, rounds: int) -> dict[str, float]:
    """GB/s of keys and values: attention here and in fresh pools, and a plain read of the pages here."""
    if not rounds:
        return {}
    held = segments(cache)
    again = [fresh(segment) for segment in held]
    dtype = held[0].dense().keys.dtype
    queries = torch.randn(cache.rows.batch, HEADS, GROUP, 1, SIZE, dtype=torch.float32).to(dtype)
    reads = [plain_read(table) for segment in held for table in tables(segment)]
    work: dict[str, Callable[[], Any]] = {
        "here": lambda: [segment.attend(queries, 0.1, weights=False) for segment in held],
        "fresh": lambda: [segment.attend(queries, 0.1, weights=False) for segment in again],
        "plain read": lambda: [read() for read in reads],
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, each in work.items():
            taken[name].append(timed(each, CPU))
    tokens = sum(int(segment.counts().sum()) for segment in held)
    nbytes = tokens * 2 * SIZE * dtype.itemsize
    return {name: nbytes / median(seconds[1:]) / 1e9 for name, seconds in taken.items()}


def measured(model: PreTrainedModel, method: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of the table for each use."""
    for use in args.uses:
        arena = None
        if use == "arena":  # as much as rows of the mean length take, and a fifth more
            page = 16 * (2 * SIZE * model.dtype.itemsize + 4) + 4
            share = 1.0 if method == "full" else 0.3
            arena = Arena(int(1.2 * share * args.layers * args.batch * HEADS * args.context * 0.6 / 16) * page)
        try:
            cache = steady(model, method, args) if use == "steady" else turnover(model, method, args, arena)
        except kvfold.OutOfPages as error:
            print(f"{method}, {use}: {error}", file=sys.stderr)
            continue
        tokens = sum(int(segment.counts().sum()) for segment in segments(cache))
        pools = {id(table.pool): table.pool for segment in segments(cache) for table in tables(segment)}
        moved = sum(getattr(pool, "moved_nbytes", 0) for pool in pools.values())
        yield {
            "method": method, "use": use, "tokens": tokens, "moved_nbytes": moved, **shares(cache),
            "rates": rates(cache, args.rounds),
        }  # fmt: skip
        del cache


def growth(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of a step's attention and write in a layer, as rows grow."""
    dtype, draw = getattr(torch, args.dtype), torch.Generator().manual_seed(0)

    def states(length: int) -> Tensor:
        return torch.randn(args.batch, HEADS, length, SIZE, generator=draw).to(dtype)

    for ragged in (False, True):
        held = []
        for _ in range(args.layers):
            length = args.context
            most = torch.full((args.batch, HEADS, 1), length)
            if ragged:
                most = torch.randint(length // 10, length * 3 // 10, most.shape, generator=draw)
            positions = torch.arange(length, dtype=torch.int32).expand(args.batch, HEADS, length)
            chunk = Chunk(states(length), states(length), positions < most, {POSITION: positions})
            held.append(Dense().open(Spec.of(chunk)))
            held[-1].append(chunk, even=not ragged)
        queries, taken = torch.randn(args.batch, HEADS, GROUP, 1, SIZE, generator=draw).to(dtype), []
        for number in range(args.steps):
            place = torch.full((args.batch, 1), args.context + number, dtype=torch.int32)
            new = states(1), states(1)
            work = [partial(segment.step, queries, *new, place, 0.1, weights=False) for segment in held]
            taken.append(timed(lambda work=work: [each() for each in work], CPU) / args.layers)
        yield {
            "rows": "ragged" if ragged else "even", "tokens": sum(int(x.counts().sum()) for x in held) // args.layers,
            "median": median(taken), "mean": mean(taken), "nbytes": sum(x.nbytes for x in held) // args.layers,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="full;snapkv(budget=0.2);kvfold(budget=0.2);h2o(budget=0.2)")
    parser.add_argument("--uses", type=lambda text: text.split(","), default=["steady", "rows", "arena"])
    parser.add_argument("--context", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--changes", type=int, default=40, help="rows that come and go")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9, help="0: no speeds, on a machine that is busy")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--growth", action="store_true", help="time steps in pools that grow instead")
    args = parser.parse_args()
    if args.growth:
        print(f"{describe(CPU)['cpu']}, {args.dtype}, {args.batch} rows, {args.context} tokens, {args.steps} steps\n")
        print("| rows | tokens | MB | ms of a step in a layer, median | mean |\n| --- | ---: | ---: | ---: | ---: |")
        for row in growth(args):
            times = f"{1e3 * row['median']:.2f} | {1e3 * row['mean']:.2f}"
            print(f"| {row['rows']} | {row['tokens']} | {row['nbytes'] / 1e6:.1f} | {times} |", flush=True)
        return
    model, rows = build(args.layers, getattr(torch, args.dtype)), []
    print(f"{describe(CPU)['cpu']}, {args.dtype}, {args.batch} rows, {args.context} tokens, {args.steps} steps\n")
    print("| method | use | in runs of 64 KB | mean run, KB | MB | moved, MB | attention, GB/s | fresh | plain read |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with torch.no_grad():
        for method in args.methods.split(";"):
            for row in measured(model, method, args):
                rows.append(row)
                speeds = " | ".join(f"{row['rates'].get(name, 0):.1f}" for name in ("here", "fresh", "plain read"))
                print(
                    f"| `{method}` | {row['use']} | {row['in_runs']:.2f} | {row['mean_run'] / 1024:.0f} | "
                    f"{row['nbytes'] / 1e6:.0f} | {row['moved_nbytes'] / 1e6:.0f} | {speeds} |",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(CPU), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
