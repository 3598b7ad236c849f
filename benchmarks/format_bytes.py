"""Bytes of a cache against float16's, everything included: codes, scales, maps, positions, tables, windows.

    python benchmarks/format_bytes.py --context 6144 --methods "fp8,kivi,mustafar(key_sparsity=0.7, value_sparsity=0.7)"

One exact prefill of random ids in `--dtype` fills them all. transformers' own caches come first, those that work here;
how else they are compared: `kvfold bench run --quantized`.
"""

import argparse
from pathlib import Path

import kvfold
from kvfold.bench.contenders import (
    DYNAMIC,
    draw_prompts,
    fill_all,
    fitting,
    held_bytes,
    kvfold_contenders,
    transformers_contenders,
)
from kvfold.bench.machine import versions
from kvfold.evaluation.compare import split_names
from kvfold.evaluation.escaping import code_cell
from kvfold.files import write_json
from kvfold.hf.costs import HALF
from kvfold.methods.registry import parse

METHODS = "full,fp8,kivi,kivi(bits=2),mustafar,mustafar(key_sparsity=0.7, value_sparsity=0.7),think,kvquant,elitekv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--context", type=int, default=6144)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, _ = kvfold.load(args.model, dtype=args.dtype)
    ids = draw_prompts(model, 1, args.context)
    theirs, skipped = transformers_contenders(model)
    wanted = kvfold_contenders(model, [(name, parse(name)) for name in split_names(args.methods)])
    ours, unfit = fitting(model, wanted)  # some need a calibration of the model
    caches = [(contender, contender.make()) for contender in (*theirs, *ours)]
    fill_all(model, [cache for _, cache in caches], ids)
    rows = [{"cache": c.name, "library": c.library, "nbytes": held_bytes(cache)} for c, cache in caches]
    whole = next(row["nbytes"] for row in rows if row["cache"] == DYNAMIC) * HALF // model.dtype.itemsize
    print(
        f"{args.model}, {args.context} tokens, {args.dtype}: float16's are {whole / args.context:,.0f} bytes a token\n"
    )
    print("| cache | bytes a token | of float16 |\n| --- | ---: | ---: |")
    for row in rows:
        print(f"| {code_cell(row['cache'])} | {row['nbytes'] / args.context:,.0f} | {row['nbytes'] / whole:.3f} |")
    for left in (*skipped, *unfit):
        print(f"\n{left['contender']} is left out: {left['reason']}")
    if args.out is not None:
        about = {
            "model": args.model,
            "dtype": args.dtype,
            "context": args.context,
            "versions": versions(),
            "skipped": [*skipped, *unfit],
        }
        write_json(args.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
