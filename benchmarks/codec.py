"""Saved caches in a codec: bytes of the file, and what the model then says of the tokens that follow.

    python benchmarks/codec.py --file wikitext-2-valid.txt --context 6144 --codecs "cachegen(level=1),cachegen"

Bytes are the whole file's (positions, tables, header and all), as a share of keys and values in float16.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import kvfold
from kvfold.bench.machine import describe, versions
from kvfold.evaluation.compare import split_names
from kvfold.evaluation.decoding import prefill
from kvfold.evaluation.escaping import code_cell
from kvfold.files import write_json

STORY = Path(__file__).parents[1] / "examples" / "documents" / "blue-carbuncle.txt"
CODECS = "cachegen(level=1),cachegen,cachegen(level=3),cachegen(per_head=True),cachegen(first=0),cachegen(group=10)"


@torch.no_grad()
def said(model: torch.nn.Module, cache: kvfold.Cache, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after each of some tokens that follow what the cache holds."""
    return model(ids, past_key_values=cache).logits[0].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--codecs", default=CODECS)
    parser.add_argument("--file", type=Path, default=STORY)
    parser.add_argument("--context", type=int, default=6144)
    parser.add_argument("--tokens", type=int, default=64, help="Those behind the context that are asked about.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = kvfold.load(args.model)
    text = args.file.read_text(encoding="utf-8")[: 20 * (args.context + args.tokens)]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.context + args.tokens]
    if ids.shape[1] < args.context + args.tokens:
        parser.error(f"--context={args.context}: {args.file.name} has only {ids.shape[1]} tokens")
    cache = kvfold.Cache(model, "full")
    prefill(model, ids[:, : args.context], cache)
    truth = said(model, cache.fork(), ids[:, args.context :])
    numbers = sum(core.counts().sum() * sum(core.shape[1:]) for core in cache.paged)
    print(f"{args.model}, {args.context} tokens, {torch.get_num_threads()} threads\n")
    print("| codec | bytes | KL | top-1 | save, s | load, s |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        for codec in split_names(args.codecs):
            began = time.perf_counter()
            cache.save(path, codec=codec)
            saved = time.perf_counter()
            loaded = kvfold.Cache.load(path, model)
            ended = time.perf_counter()
            found = said(model, loaded, ids[:, args.context :])
            row = {
                "codec": codec,
                "bytes": path.stat().st_size / (2 * int(numbers)),
                "kl": float((truth.exp() * (truth - found)).sum(-1).mean()),
                "top1": float((truth.argmax(-1) == found.argmax(-1)).float().mean()),
                "save": saved - began,
                "load": ended - saved,
            }
            rows.append(row)
            figures = (
                f"{row['bytes']:.3f} | {row['kl']:.4f} | {row['top1']:.3f} | {row['save']:.1f} | {row['load']:.1f}"
            )
            print(f"| {code_cell(codec)} | {figures} |")
    if args.out is not None:
        about = {"model": args.model, "context": args.context, "tokens": args.tokens}
        write_json(args.out, {**about, "machine": describe(model.device), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
