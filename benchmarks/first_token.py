"""Time to the first token: methods take turns on one prompt, ratios of medians to the full cache.

    python benchmarks/first_token.py --methods "full,fastkv,speckv(lookahead=8),specpc" --context 6000 --budget 0.2

A draft is the model itself unless a method's option names another.
"""

import argparse
import statistics
from pathlib import Path

import torch

import kvfold
from kvfold.bench.machine import describe, versions
from kvfold.evaluation.compare import split_names, with_budget
from kvfold.evaluation.decoding import prefill
from kvfold.evaluation.escaping import code_cell
from kvfold.files import write_json

STORY = Path(__file__).parents[1] / "examples" / "documents" / "blue-carbuncle.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", default="full,fastkv")
    parser.add_argument("--file", type=Path, default=STORY)
    parser.add_argument("--context", type=int, default=6000)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = kvfold.load(args.model)
    ids = tokenizer(args.file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : args.context]
    if ids.shape[1] < args.context:
        parser.error(f"--context={args.context}: {args.file.name} has only {ids.shape[1]} tokens")
    methods = {name: with_budget(name, args.budget) for name in split_names(args.methods)}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    ratios = {}
    prefill(model, ids[:, :256], kvfold.Cache(model, "full"))  # kernels and caches are warm
    for _ in range(args.repeats):
        for name, method in methods.items():
            cache = kvfold.Cache(model, method)
            seconds[name].append(prefill(model, ids, cache).seconds)
            ratios[name] = cache.nbytes / cache.dense_nbytes
    base = statistics.median(seconds["full"]) if "full" in seconds else None
    print(f"{args.model}, {args.context} tokens, {torch.get_num_threads()} threads, median of {args.repeats}\n")
    print("| method | first token, s | times shorter than full | KV ratio |\n| --- | ---: | ---: | ---: |")
    rows = []
    for name, found in seconds.items():
        middle = statistics.median(found)
        faster = None if base is None else base / middle
        rows.append({"method": name, "seconds": found, "median": middle, "faster": faster, "ratio": ratios[name]})
        print(
            f"| {code_cell(name)} | {middle:.2f} | {'-' if faster is None else f'{faster:.2f}'} | {ratios[name]:.3f} |"
        )
    if args.out is not None:
        about = {"model": args.model, "context": args.context, "budget": args.budget, "machine": describe(model.device)}
        write_json(args.out, {**about, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
