"""Method `full` against transformers' DynamicCache with SDPA: seconds of prefill and of a decode step, in one run.

    python benchmarks/full_vs_dynamic.py --model smollm2-135m-instruct --context 6000 --batch 1 \
        --out benchmarks/results/full-vs-dynamic.json

The two take turns (A B A B ...); medians and their ratio are printed. Beside a step's time stands its bound: the
weights and the KV bytes read once, at the read bandwidth that this machine shows in the same run.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache

import kvfold


@torch.no_grad()
def measure(model: torch.nn.Module, cache: object, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds of the prefill, and of a decode step."""
    start = time.perf_counter()
    token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    read = time.perf_counter() - start
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        taken.append(time.perf_counter() - start)
    return read, statistics.median(taken)


def bandwidth() -> float:
    """Bytes a second of a plain read of 1 GiB."""
    data = torch.ones(2**28)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        taken.append(time.perf_counter() - start)
    return data.nbytes / statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--context", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model, _ = kvfold.load(args.model, dtype=args.dtype)
    ids = torch.randint(10, 10_000, (args.batch, args.context), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[tuple[float, float]]] = {"dynamic": [], "full": []}
    for turn in range(args.rounds + 1):  # the first turn warms up
        for name in found:
            model.set_attn_implementation("sdpa" if name == "dynamic" else "kvfold") if turn else None
            cache = DynamicCache(config=model.config) if name == "dynamic" else kvfold.Cache(model, "full")
            took = measure(model, cache, ids if turn else ids[:, :256], args.steps if turn else 2)
            held = cache.nbytes if name == "full" else 0
            if turn:
                found[name].append(took)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rate = bandwidth()
    median = {n: [statistics.median(x[i] for x in took) for i in (0, 1)] for n, took in found.items()}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "model": args.model, "context": args.context, "batch": args.batch, "dtype": args.dtype,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "prefill_seconds": {n: m[0] for n, m in median.items()},
        "step_seconds": {n: m[1] for n, m in median.items()},
        "prefill_ratio_full_over_dynamic": median["full"][0] / median["dynamic"][0],
        "step_ratio_full_over_dynamic": median["full"][1] / median["dynamic"][1],
        "step_bound_seconds": (weights + held) / rate, "read_gb_per_second": rate / 1e9,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
