"""Long generation under a limit: KL to the full cache over thousands of teacher-forced steps, methods x budgets.

    python benchmarks/generation.py --model smollm2-135m-instruct --data ../shared/data --fast-linears \\
        --methods 'kvfold;h2o;streamingllm;decoding(score="snapkv")' --budgets 256,128 --out build/generation-smollm2

Protocol: a document's first `--context` tokens are read at once; its next `--tokens` are fed one by one through
`model(...)`, and the next-token distributions after the last `--last` of them are compared with the full cache's: mean
KL(full || method) in nats a token, worked out in float32, and the share of equal greedy tokens. `--batch` documents of
the same length go side by side, without padding.

The full cache's answers come of one exact pass over each document, and lie in `--out`/states as what goes into the
model's output layer, in the model's dtype: from these the logits are made again to the last bit but one. The best
tokens with a log-sum-exp would cut the tail, into which a compressed cache puts its mistakes, and all logits in
float16 would round log-probabilities of -10 by .004 and take a hundred times the room (Gemma: 1 GB a document).

Bytes are a row's share of what the cache holds, sliding windows included, at most after any step and after the last.
Milliseconds are those of a step of the whole batch, median and mean (which holds the steps at which a method folds).
Intervals: bootstrap over documents; `share` is the KL of `--against` over a method's, of the same documents.
`--out` holds results.jsonl, to go on in (a further method is added), summary.json and table.md over this run's
documents.
"""

import argparse
import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from long_runs import Contender, RunFolder, arguments, contenders, load, long_documents, names_in, told, write_table
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvfold
from kvfold.evaluation.escaping import code_cell
from kvfold.evaluation.forced import drift, full_states
from kvfold.evaluation.statistics import bootstrap_interval, percentile_interval, resampled_indices
from kvfold.files import write_whole


def states_of(model: Any, ids: Tensor, last: int, folder: Path) -> Tensor:
    """The full cache's states (N, E) after the last tokens of ids (T,), read from the folder or put there."""
    digest = hashlib.sha256(ids.numpy().tobytes() + str(last).encode()).hexdigest()[:16]
    path = folder / f"{digest}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = full_states(model, ids[None], last)[0].cpu().contiguous()
        write_whole(path, lambda part: save_file({"states": found}, part))
    return load_file(path)["states"]


def measure(model: Any, one: Contender, docs: Sequence[tuple[str, Tensor]], args: argparse.Namespace) -> list[Any]:
    """A record for each of some documents, which are one batch."""
    ids = torch.stack([each for _, each in docs])
    states = torch.stack([states_of(model, each, args.last, args.out / "states") for _, each in docs])
    cache = kvfold.Cache(model, one.method)
    found = drift(model, cache, ids, args.context, states)
    rows, steps = len(docs), [1e3 * seconds for seconds in found.seconds]
    return [
        {
            "doc": name, "kl": found.kl[row], "top1": found.top1[row], "rows": rows, "ms": median(steps),
            "mean_ms": mean(steps), "p99_ms": float(np.quantile(steps, 0.99)), "most_nbytes": found.most_nbytes // rows,
            "nbytes": found.nbytes // rows, "dense_nbytes": cache.dense_nbytes // rows,
            "most_tokens": found.most_tokens,
        }
        for row, (name, _) in enumerate(docs)
    ]  # fmt: skip


def summed(found: Sequence[dict[str, Any]], against: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over documents, with 95 % intervals; the share is over those that both have."""
    kl = [one["kl"] for one in found]
    low, high = bootstrap_interval(kl)
    out = {
        "documents": len(found), "kl": mean(kl), "kl_low": low, "kl_high": high,
        **{name: mean(one[name] for one in found) for name in ("top1", "ms", "mean_ms", "p99_ms", "nbytes")},
        **{name: max(one[name] for one in found) for name in ("most_nbytes", "most_tokens")},
        "bytes_of_dense": mean(one["nbytes"] / one["dense_nbytes"] for one in found),
        "rows": sorted({one["rows"] for one in found}),
    }  # fmt: skip
    theirs = {one["doc"]: one["kl"] for one in against}
    pairs = np.array([(theirs[one["doc"]], one["kl"]) for one in found if one["doc"] in theirs])
    if len(pairs) and pairs[:, 1].sum() > 0:
        draws = np.concatenate([pairs[drawn].mean(1) for drawn in resampled_indices(len(pairs))])
        first, last = percentile_interval(draws[:, 0] / draws[:, 1].clip(min=1e-12))
        out |= {"share": float(pairs[:, 0].sum() / pairs[:, 1].sum()), "share_low": first, "share_high": last}
    return out


def report(kept: RunFolder, ran: Sequence[Contender], docs: Sequence[str], against: str) -> tuple[dict[str, Any], str]:
    """Summary by contender, and the table, over these documents."""
    summary: dict[str, Any] = {}
    head = f"KL, `{against}`'s share of it" if against else "share"
    lines = [
        f"| budget | method | documents | KL [95 %] | {head} [95 %] | equal tokens "
        "| ms a step, median / mean / 99 % | rows | MB at most | at the end | of dense | tokens a head at most |",
        "| ---: | --- | ---: | --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    baseline = {one.budget: kept.of(one, docs) for one in ran if one.name == against}
    for one in ran:
        if not (found := kept.of(one, docs)):
            continue
        s = summary[one.key] = summed(found, baseline.get(one.budget, []))
        share = f"{s['share']:.2f} [{s['share_low']:.2f}, {s['share_high']:.2f}]" if "share" in s else "-"
        cells = [
            "-" if one.budget is None else f"{one.budget}", code_cell(one.name), f"{s['documents']}",
            f"{s['kl']:.4f} [{s['kl_low']:.4f}, {s['kl_high']:.4f}]", share, f"{s['top1']:.3f}",
            f"{s['ms']:.1f} / {s['mean_ms']:.1f} / {s['p99_ms']:.1f}", ", ".join(map(str, s["rows"])),
            f"{s['most_nbytes'] / 1e6:.2f}", f"{s['nbytes'] / 1e6:.2f}", f"{s['bytes_of_dense']:.3f}",
            f"{s['most_tokens']}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return summary, "\n".join(lines) + "\n"


def run(model: Any, docs: Sequence[tuple[str, Tensor]], args: argparse.Namespace) -> str:
    """Measure what is missing in `--out`; the table."""
    names = [name for name, _ in docs]
    about = {name: getattr(args, name) for name in ("model", "dtype", "context", "tokens", "last", "device")}
    kept = RunFolder(args.out, about, "doc")
    ran, again, started = contenders(args.methods, args.budgets), names_in(args.again), time.perf_counter()
    for number, one in enumerate(ran, 1):
        missing = kept.missing(one, names, one.name in again)
        left = [doc for doc in docs if doc[0] in missing]
        for batch in split(left, args.batch):
            kept.add(one, measure(model, one, batch, args))
            write_table(args.out, *report(kept, ran, names, args.against))
            passed = time.perf_counter() - started
            told(f"{number}/{len(ran)} {one.key}: {', '.join(name for name, _ in batch)} ({passed:.0f} s)")
    summary, table = report(kept, ran, names, args.against)
    write_table(args.out, summary, table)
    return table


def split(docs: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Batches of at most so many."""
    return (docs[i : i + size] for i in range(0, len(docs), size))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", default="full;kvfold;h2o;tova;streamingllm")
    parser.add_argument("--against", default="kvfold", help="the method whose KL is set in proportion to the others'")
    parser.add_argument("--docs", type=int, default=12)
    parser.add_argument("--skip", type=int, default=0, help="documents to leave out first: those that choices saw")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=3500)
    parser.add_argument("--last", type=int, default=2000)
    args = parser.parse_args()
    if not 0 < args.last <= args.tokens:
        parser.error(f"--last {args.last} must be between 1 and --tokens {args.tokens}")
    model, tokenizer = load(args)
    docs = long_documents(tokenizer, args.data, args.context + args.tokens, args.docs, args.skip)
    print(f"{args.model}, {args.dtype}, {args.context} tokens read, {args.tokens} fed, the last {args.last} compared\n")
    print(run(model, docs, args), end="")


if __name__ == "__main__":
    main()
