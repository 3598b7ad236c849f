"""Perplexity of a text whose beginning a cache holds in a format: what its rounding costs, token by token.

    python benchmarks/perplexity.py --file wikitext-2-valid.txt --context 2048 --tokens 2048 \\
        --methods "kivi(bits=4),kivi(bits=2),turboquant,kvquant,zipcache,mustafar,mikv(bits=4)"

The first `--context` tokens are read at once, exactly, and the next `--tokens` are fed one by one: each is scored by
what the cache holds then. (In one pass over all nothing would be seen: a prompt attends in full.) DynamicCache comes
first; it is what the others are held against. transformers' quantised caches are among the rows where they work; what
is missing is named. Bytes are those at the end, everything included, over DynamicCache's in float16.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvfold
from kvfold.bench.contenders import fitting, held_bytes, kvfold_contenders, transformers_contenders
from kvfold.evaluation.compare import split_names
from kvfold.evaluation.decoding import prefill
from kvfold.evaluation.escaping import code_cell
from kvfold.hf.argument import with_cache
from kvfold.methods.registry import parse

METHODS = "full,kivi(bits=4),kivi(bits=2),turboquant,kvquant,zipcache,mustafar,mikv(bits=4)"


@torch.no_grad()
def perplexity(model: Any, cache: Any, ids: Tensor, context: int) -> float:
    """Of ids (1, T) from number `context` + 1 on."""
    logits, losses = prefill(model, ids[:, :context], cache).logits, []
    for place in range(context, ids.shape[1]):
        losses.append(-logits.float().log_softmax(-1)[ids[0, place]].item())
        given = ids[:, place : place + 1]
        logits = model(input_ids=given, **with_cache(model, cache)).logits[0, -1]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantized", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    model, tokenizer = kvfold.load(args.model, dtype=args.dtype, progress=False)
    ids = tokenizer(args.file.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    ids = ids[:, : args.context + args.tokens]
    if ids.shape[1] < args.context + args.tokens:
        parser.error(f"file={args.file} has {ids.shape[1]} tokens, context and tokens ask for more")
    theirs, skipped = transformers_contenders(model, args.quantized, bits=(4, 2))
    wanted = kvfold_contenders(model, [(name, parse(name)) for name in split_names(args.methods)])
    ours, unfit = fitting(model, wanted)  # some need a calibration of the model
    base = size = 0.0
    print(f"{args.model}, {args.dtype}: {args.context} tokens read, {args.tokens} fed\n")
    print("| cache | perplexity | of DynamicCache's | bytes of float16 |\n| --- | ---: | ---: | ---: |")
    with kvfold.fast_linears(model):
        for contender in (*theirs, *ours):
            cache = contender.make()
            found, held = perplexity(model, cache, ids, args.context), held_bytes(cache)
            base, size = base or found, size or held * 2 / model.dtype.itemsize
            print(f"| {code_cell(contender.name)} | {found:.3f} | {found / base:.4f} | {held / size:.3f} |", flush=True)
    for left in (*skipped, *unfit):
        print(f"\n{left['contender']} is left out: {left['reason']}")


if __name__ == "__main__":
    main()
