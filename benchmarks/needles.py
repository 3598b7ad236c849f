"""Needles found in real text, for methods x budgets: five depths, the question in the prompt (query-aware).

python benchmarks/needles.py --model gemma3-270m --tokens 3600 --out benchmarks/results/needles-gemma3-270m.json
"""

import argparse
import json
import sys
from pathlib import Path

import kvfold
from kvfold.evaluation.compare import split_names, with_budget
from kvfold.evaluation.needles import DEPTHS, find, plant

STORY = Path(__file__).parents[1] / "examples/documents/blue-carbuncle.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--tokens", type=int, default=3600)
    parser.add_argument("--methods", default="kvmerger,h2o,snapkv,tova,streamingllm")
    parser.add_argument("--budgets", default="0.5,0.35,0.2")
    parser.add_argument("--file", type=Path, default=STORY)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model, tokenizer = kvfold.load(args.model)
    methods, budgets = split_names(args.methods), [float(b) for b in args.budgets.split(",")]
    cells = [("full", 1.0), *((m, b) for m in methods for b in budgets)]
    found = dict.fromkeys(cells, 0)
    asked = 0
    for seed in range(args.seeds):
        for depth in DEPTHS:
            haystack = plant(tokenizer, args.file.read_text(), args.tokens, depth, seed)
            caches = [kvfold.Cache(model, with_budget(m, b)) for m, b in cells]
            for cell, hit in zip(cells, find(model, tokenizer, haystack, caches), strict=True):
                found[cell] += hit
            asked += 1
            print(f"{asked}/{args.seeds * len(DEPTHS)}", file=sys.stderr)
    print(f"\n{args.model}, {haystack.ids.shape[1]} tokens, needles found of {asked}\n")
    print("| method | " + " | ".join(f"{b:.0%}" for b in budgets) + " |\n| --- |" + " --- |" * len(budgets))
    print("| full | " + " | ".join(str(found["full", 1.0]) for _ in budgets) + " |")
    for m in methods:
        print(f"| {m} | " + " | ".join(str(found[m, b]) for b in budgets) + " |")
    if args.out:
        counts = {f"{m}@{b}": n for (m, b), n in found.items()}
        about = {
            "command": " ".join(["python", *sys.argv]),
            "model": args.model,
            "tokens": args.tokens,
            "depths": DEPTHS,
            "seeds": args.seeds,
            "asked": asked,
        }
        args.out.write_text(json.dumps({**about, "found": counts}, indent=1))


if __name__ == "__main__":
    main()
