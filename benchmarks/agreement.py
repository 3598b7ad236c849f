"""Agreement with the full cache over real documents: mean KL and equal greedy tokens, for methods x budgets.

    python benchmarks/agreement.py --model smollm2-135m-instruct --data ../shared/data --docs 40 \
        --out benchmarks/results/merging-smollm2-135m-instruct.json

Protocol: a document's first 1,024, 1,536 or 2,048 tokens (in turn) are read and compressed, without a question; its
next 64 tokens are then fed, appended to what is kept, and every next-token distribution is compared with the
full cache's. One exact prefill serves all methods and budgets of a document. Intervals: bootstrap over documents.
What `--out` holds already is not run again: an interrupted run goes on, and a further method is added to the table.
The file lists every command that it comes from; its summary, like the table, is over the documents of the last run.
"""

import argparse
import itertools
import json
import re
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvfold
from kvfold.evaluation.agreement import agreement
from kvfold.evaluation.compare import split_names, with_budget
from kvfold.evaluation.escaping import in_markdown
from kvfold.hf.shared_prefill import prefill_many

METHODS = "kvmerger,h2o,snapkv,tova,streamingllm"
CONTEXTS = (1024, 1536, 2048)


def documents(folder: Path) -> list[tuple[str, str]]:
    """Names and texts: long WikiText-2 articles and L-Eval inputs, alternating."""
    wiki = re.split(r"\n(?= = [^=].* = \n)", (folder / "wikitext-2-valid.txt").read_text())
    articles = [(f"wikitext:{text.split(' = ')[1]}", text) for text in wiki if len(text) > 8_000]
    inputs = []
    for path in sorted((folder / "leval").glob("*.jsonl")):
        seen: set[str] = set()
        for i, line in enumerate(path.read_text().splitlines()):
            text = json.loads(line)["input"]
            if len(text) > 10_000 and text[:200] not in seen and len(seen) < 8:
                seen.add(text[:200])
                inputs.append((i, f"{path.stem}:{i}", text))
    inputs.sort(key=lambda x: x[0])
    mixed = itertools.zip_longest(articles, [(name, text) for _, name, text in inputs])
    return [doc for pair in mixed for doc in pair if doc is not None]


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    data = np.array(values)
    picks = np.random.default_rng(seed).integers(0, len(data), (2000, len(data)))
    low, high = np.quantile(data[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budgets", default="0.5,0.35,0.2,0.1")
    parser.add_argument("--docs", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    kept = Results(args)
    model, tokenizer = kvfold.load(args.model, device=args.device)
    budgets = [float(b) for b in args.budgets.split(",")]
    methods = split_names(args.methods)
    cells = [(m, b) for m in methods for b in budgets]
    started, done = time.perf_counter(), 0
    for name, text in documents(args.data):
        if done == args.docs:
            break
        context = CONTEXTS[done % len(CONTEXTS)]
        ids = tokenizer(text[: 12 * (context + args.tokens)], return_tensors="pt").input_ids[:, : context + args.tokens]
        if ids.shape[1] < context + args.tokens:
            continue
        done += 1
        kept.docs.append(name)
        missing = [cell for cell in cells if not kept.has(name, *cell)]
        if not missing:
            continue
        ids = ids.to(model.device)
        caches = [kvfold.Cache(model, method) for method in ["full", *(with_budget(m, b) for m, b in missing)]]
        prompt, rest = ids[:, :context], ids[:, context:]
        prefill_many(model, {"input_ids": prompt}, caches, logits_to_keep=1)
        logits = []
        for cache in caches:
            with torch.no_grad(), cache.tentative():
                logits.append(model(input_ids=rest, past_key_values=cache).logits[0])
        for (m, b), cache, got in zip(missing, caches[1:], logits[1:], strict=True):
            found = agreement(logits[0], got)
            held = cache.nbytes / caches[0].nbytes
            kept.add(m, b, {"doc": name, "context": context, "kl": found.kl, "top1": found.top1, "bytes": held})
        kept.save()
        print(f"{done}/{args.docs} {name} ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
    report(args.model, kept, methods, budgets)
    kept.save()


class Results:
    """What was measured, in `--out` after every document; `docs` are the documents of this run so far."""

    def __init__(self, args: argparse.Namespace):
        self.path: Path | None = args.out
        self.found: dict[str, list[dict[str, Any]]] = {}
        self.docs: list[str] = []
        self.commands: list[str] = []
        self.about: dict[str, Any] = {
            "model": args.model, "tokens": args.tokens, "contexts": list(CONTEXTS), "device": args.device,
            "versions": {name: version(name) for name in ("torch", "transformers")} | {"kvfold": kvfold.__version__},
        }  # fmt: skip
        if self.path is not None and self.path.exists():
            before = json.loads(self.path.read_text())
            if "kvfold" not in before["versions"]:  # of an earlier script: nobody knows which kvfold it was
                del self.about["versions"]["kvfold"]
            differs = [key for key, value in self.about.items() if before[key] != value]
            if differs:
                raise SystemExit(f"--out={self.path} holds results of another {', '.join(differs)}; name another file")
            self.found = before["results"]
            self.commands = before.get("commands") or [before["command"]]
        command = shlex.join(["python", *sys.argv])
        self.commands = [*(one for one in self.commands if one != command), command]

    def of(self, cell: str) -> list[dict[str, Any]]:
        """The documents of this run that a cell ("method@budget") has."""
        return [one for one in self.found.get(cell, []) if one["doc"] in self.docs]

    def has(self, doc: str, method: str, budget: float) -> bool:
        """Whether a document was measured, in this run or before."""
        return any(one["doc"] == doc for one in self.found.get(f"{method}@{budget}", []))

    def add(self, method: str, budget: float, one: dict[str, Any]) -> None:
        """Take in a document."""
        self.found.setdefault(f"{method}@{budget}", []).append(one)

    def save(self) -> None:
        """Write the file whole."""
        if self.path is None:
            return
        summary = {cell: summed(found) for cell in sorted(self.found) if (found := self.of(cell))}
        written = {"commands": self.commands, **self.about, "summary": summary, "results": self.found}
        content = json.dumps(written, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(content)
        temporary.replace(self.path)


def summed(found: list[dict[str, Any]]) -> dict[str, float]:
    """Means over documents."""
    kl, top1, held = ([float(r[key]) for r in found] for key in ("kl", "top1", "bytes"))
    low, high = interval(kl)
    return {
        "documents": len(found), "kl": float(np.mean(kl)), "kl_low": low, "kl_high": high, "top1": float(np.mean(top1)),
        "bytes_of_full": float(np.mean(held)),
    }  # fmt: skip


def report(model: str, kept: Results, methods: list[str], budgets: list[float]) -> None:
    """The table of this run's documents on standard output. Raises SystemExit where there are none."""
    if not kept.docs:
        raise SystemExit("nothing was measured: --docs is 0, or no document of --data is as long as the first context")
    print(f"\n{model}, {len(kept.docs)} documents, mean KL [95 %] / equal greedy tokens / KV bytes of full\n")
    print("| method | " + " | ".join(f"{b:.0%}" for b in budgets) + " |")
    print("| --- |" + " --- |" * len(budgets))
    for m in methods:
        row = []
        for b in budgets:
            one = summed(kept.of(f"{m}@{b}"))
            interval = f"{one['kl']:.3f} [{one['kl_low']:.3f}, {one['kl_high']:.3f}]"
            row.append(f"{interval} / {one['top1']:.3f} / {one['bytes_of_full']:.3f}")
        print(f"| {in_markdown(m)} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
