"""KL to the full cache against bytes: token-only, bits-only and combined choices, at shares of a float16 cache.

    python benchmarks/bytes.py --model smollm2-135m-instruct --data ../shared/data --docs 20 --skip 8 --out FOLDER

Protocol: a document's first `--context` tokens are read and compressed, without a question; its next 64 tokens are fed
in one pass and every next-token distribution is compared with the full cache's (mean KL(full || method), nats). The
model runs in `--dtype`, and bytes are what the caches then hold, all included but sliding windows: codes, scales,
positions, columns, page tables of the layers on pages, as a share of what a dense float16 cache takes for those layers
and tokens. Windows stand in a column of their own. A method with a budget gets, for each of `--shares`, the most tokens
whose bytes after the prompt are within it (asked of its formats, before anything is read; pages of 16 tokens make that
coarse); a format alone is what it is. Intervals: bootstrap over documents. `--out` holds results.jsonl, to go on in,
summary.json, table.md.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from long_runs import Contender, RunFolder, arguments, load, long_documents, names_in, told, write_table
from torch import Tensor

import kvfold
from kvfold.bench.plan import ModelShape, shape_of
from kvfold.evaluation.agreement import agreement
from kvfold.evaluation.escaping import code_cell
from kvfold.evaluation.statistics import bootstrap_interval
from kvfold.hf.argument import with_cache
from kvfold.hf.costs import HALF, with_budget_of
from kvfold.hf.layers import PagedLayer, beside_bytes
from kvfold.hf.shared_prefill import prefill_many
from kvfold.methods import Method, parse
from kvfold.methods.base import stages_of

FED = 64
TOKENS_ONLY = "kvfold;headkv;h2o;keepkv;snapkv;streamingllm"
BITS_ONLY = (
    "fp8;kivi(bits=4);kivi(bits=2);zipcache;kvquant(bits=4);turboquant(bits=4);turboquant(bits=2);"
    "turboquant(bits=4, basis='channels');turboquant(bits=3, basis='channels');turboquant(bits=2, basis='channels');"
    "turboquant(bits=4, basis='measured')"
)
COMBINED = (
    "kvfold | fp8;kvfold | turboquant(bits=4);kvfold | turboquant(bits=4, basis='channels');"
    "kvfold | turboquant(bits=3, basis='channels');kvfold | turboquant(bits=2, basis='channels');"
    "kvfold | turboquant(bits=4, basis='measured');headkv | turboquant(bits=4);snapkv | kivi(bits=4);"
    "snapkv | kivi(bits=2)"
)


@dataclass(frozen=True)
class Shares:
    """What a model's layers on pages hold, by a method's budget."""

    shape: ModelShape
    context: int
    dtype: str

    @property
    def dense(self) -> int:
        """Bytes of a dense float16 cache of the layers on pages."""
        return sum(layer.dense_bytes(self.context, HALF) for layer in self.shape.layers if layer.paged)

    def of(self, method: Method) -> float:
        """The share that a method's formats take after the prompt, as they count it themselves."""
        held = self.shape.held(method, self.context, self.dtype)
        return sum(here.nbytes(spec) for _, spec, here in held if here is not None) / self.dense

    def fitting(self, method: Method, share: float) -> int | None:
        """The most tokens a head within a share; None where not one is."""
        low, high = 0, self.context
        while low < high:
            middle = (low + high + 1) // 2
            try:
                made = with_budget_of(method, middle)
            except ValueError:  # less than the method's other options leave room for
                low = middle
                continue
            small = self.of(made) <= share
            low, high = (middle, high) if small else (low, middle - 1)
        return low or None


def contenders(model: Any, names: Sequence[str], shares: Sequence[float], sizes: Shares) -> Iterator[Contender]:
    """Each method at each share, its key naming the share; one without a budget once."""
    for name in names:
        method = parse(name).bind(model)
        if not any(hasattr(stage, "budget") for stage in stages_of(method)):
            yield Contender(name, method, None)
            continue
        for share in shares:
            budget = sizes.fitting(method, share)
            if budget is None:
                told(f"{name}: nothing fits in {share:.4f}")
                continue
            try:
                made = with_budget_of(method, budget)
            except ValueError as error:
                told(f"{name}: {error}")
                continue
            yield Contender(name, made, share)


def split_bytes(cache: kvfold.Cache) -> tuple[int, int]:
    """Bytes of the layers on pages, and of all others."""
    beside = sum(beside_bytes(layer) for layer in cache.layers if not isinstance(layer, PagedLayer))
    return cache.nbytes - beside, beside


@torch.no_grad()
def measure(model: Any, ones: Sequence[Contender], name: str, ids: Tensor, sizes: Shares) -> list[dict[str, Any]]:
    """A record for each contender on one document (T,)."""
    prompt, rest = ids[None, : sizes.context], ids[None, sizes.context :]
    caches = [kvfold.Cache(model, method) for method in ("full", *(one.method for one in ones))]
    alike = [cache.shares_prefill for cache in caches]
    prefill_many(
        model, {"input_ids": prompt}, [c for c, yes in zip(caches, alike, strict=True) if yes], logits_to_keep=1
    )
    logits, held = [], []
    for cache, yes in zip(caches, alike, strict=True):
        if not yes:
            model(input_ids=prompt, **with_cache(model, cache), logits_to_keep=1)
        held.append(split_bytes(cache))
        with cache.tentative():
            logits.append(model(input_ids=rest, **with_cache(model, cache)).logits[0])
    out = list[dict[str, Any]]()
    for one, cache, got, (paged, windows) in zip(ones, caches[1:], logits[1:], held[1:], strict=True):
        found = agreement(logits[0], got)
        out.append(
            {"contender": one.key, "doc": name, "kl": found.kl, "top1": found.top1, "bytes": paged / sizes.dense,
             "windows": windows / sizes.dense, "tokens": cache.kept_tokens}
        )  # fmt: skip
    return out


def report(kept: RunFolder, ran: Sequence[Contender], docs: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Summary by contender, and the table: methods down, by share."""
    summary: dict[str, Any] = {}
    lines = [
        "| share | method | KL [95 %] | equal tokens | bytes of float16 | windows beside | tokens a head |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in sorted(ran, key=lambda one: -(one.budget or 2.0)):
        if not (found := kept.of(one, docs)):
            continue
        kl = [each["kl"] for each in found]
        low, high = bootstrap_interval(kl)
        names = ("top1", "bytes", "windows", "tokens")
        s = {"documents": len(found), "kl": mean(kl), "kl_low": low, "kl_high": high}
        s |= {name: mean(each[name] for each in found) for name in names}
        summary[one.key] = {**s, "method": one.name, "share": one.budget}
        cells = [
            "its own" if one.budget is None else f"{one.budget:.4f}", code_cell(one.name),
            f"{s['kl']:.4f} [{low:.4f}, {high:.4f}]", f"{s['top1']:.3f}", f"{s['bytes']:.4f}", f"{s['windows']:.3f}",
            f"{s['tokens']:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return summary, "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", default=f"{TOKENS_ONLY};{BITS_ONLY};{COMBINED}")
    parser.add_argument("--shares", default="0.25,0.125,0.0625,0.03125")
    parser.add_argument("--docs", type=int, default=20)
    parser.add_argument("--skip", type=int, default=8, help="documents to leave out first: those that choices saw")
    parser.add_argument("--context", type=int, default=4096)
    args = parser.parse_args()
    model, tokenizer = load(args)
    docs = long_documents(tokenizer, args.data, args.context + FED, args.docs, args.skip)
    shares = [float(share) for share in args.shares.split(",")]
    sizes = Shares(shape_of(model), args.context, args.dtype)
    about = {name: getattr(args, name) for name in ("model", "dtype", "context", "device")}
    kept = RunFolder(args.out, about, "doc")
    ran = list(contenders(model, names_in(args.methods), shares, sizes))
    names, again, started = [name for name, _ in docs], names_in(args.again), time.perf_counter()
    for number, (name, ids) in enumerate(docs, 1):
        left = [one for one in ran if kept.missing(one, [name], one.name in again)]
        if left:
            found = measure(model, left, name, ids, sizes)
            for one, record in zip(left, found, strict=True):
                kept.add(one, [record])
        summary, table = report(kept, ran, names[:number])
        write_table(args.out, summary, table)
        told(f"{number}/{len(docs)} {name} ({time.perf_counter() - started:.0f} s)")
    print(
        f"{args.model}, {args.dtype}, {args.context} tokens read, {FED} fed, {len(docs)} documents\n\n{table}", end=""
    )


if __name__ == "__main__":
    main()
