"""NVIDIA's kvpress as a peer: seconds of a prefill that a press shrinks, and of a decode step after it.

An environment of its own (torch first, its CPU wheel):

    python3.11 -m venv kvpress-env
    kvpress-env/bin/pip install "torch==2.13.0"
    kvpress-env/bin/pip install "kvpress==0.5.5" "transformers==5.2.0" "torch==2.13.0"

    kvpress-env/bin/python benchmarks/peers/kvpress_peer.py --model FOLDER --method snapkv --budget 0.2 \
        --context 6000 --batch 1 --new-tokens 32 --dtype float32

FOLDER is a transformers folder (config.json, safetensors). The prompt is `--context` random token ids, seeded, each
row another. A round reads it into a new DynamicCache inside the press's context manager, as kvpress's own pipeline
does, then decodes greedily, positions going on from the context's length; the budget is the fraction of the KV pairs
that stays, 1 - compression_ratio. The prefill's seconds are the median of the rounds, and a step's that of all their
steps. `kv_bytes` is what the cache's tensors hold after the prefill. The method `full` is the same with no press. One
JSON object is printed on the last line. With `--turns` it waits for what it is asked (turns.py), as `kvfold bench run
--peer-python` does.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import kvpress
import machine
import torch
import turns
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

PRESSES = {
    "full": None,
    "expected-attention": kvpress.ExpectedAttentionPress,
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "lagkv": kvpress.LagKVPress,
    "pyramidkv": kvpress.PyramidKVPress,
    "random": kvpress.RandomPress,
    "snapkv": kvpress.SnapKVPress,
    "streamingllm": kvpress.StreamingLLMPress,
    "tova": kvpress.TOVAPress,
}


def held(cache: DynamicCache) -> int:
    """Bytes of the storages under a cache's keys and values, each counted once."""
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Decoding:
    """A batch that has read its prompt, and goes on from there."""

    @torch.no_grad()
    def __init__(self, model, press, ids: torch.Tensor):
        self.model, self.cache, self.position = model, DynamicCache(), ids.shape[1]
        start = time.perf_counter()
        with nullcontext() if press is None else press(model):
            logits = model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
        self.token = logits[:, -1:].argmax(-1)
        self.read_seconds = time.perf_counter() - start
        self.kv_bytes = held(self.cache)

    @torch.no_grad()
    def steps(self, count: int) -> list[float]:
        """The seconds of the next `count` greedy steps."""
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            where = torch.full_like(self.token, self.position)
            logits = self.model(input_ids=self.token, past_key_values=self.cache, position_ids=where).logits
            self.token = logits[:, -1:].argmax(-1)
            taken.append(time.perf_counter() - start)
            self.position += 1
        return taken


def press_for(method: str, budget: float):
    """A press that keeps this share, None for a full cache."""
    make = PRESSES[method]
    return None if make is None else make(compression_ratio=1 - budget)


def take_turns(model, ids: torch.Tensor, about: dict, out) -> None:
    """Each method that is asked for has a batch of its own."""
    batches: dict[str, Decoding] = {}

    def read(method: str, budget: float, rows: int, context: int) -> dict:
        return {"seconds": Decoding(model, press_for(method, budget), ids[:rows, :context]).read_seconds}

    def fill(method: str, budget: float) -> dict:
        batches[method] = Decoding(model, press_for(method, budget), ids)
        return {"kv_bytes": batches[method].kv_bytes}

    def decode(method: str, budget: float, steps: int) -> dict:
        return {"seconds": batches[method].steps(steps)}

    def report(method: str, budget: float) -> dict:
        return {**about, "method": method, "budget": budget, "peak_rss_bytes": machine.peak_rss()}

    turns.serve({"read": read, "fill": fill, "decode": decode, "report": report}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a transformers folder")
    parser.add_argument("--method", choices=PRESSES, default="snapkv")
    parser.add_argument("--budget", type=float, default=0.2, help="fraction of the KV pairs that stays")
    parser.add_argument("--context", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", action="store_true", help="wait for what standard input asks")
    args = parser.parse_args()

    out = turns.answers() if args.turns else None
    disable_progress_bar()
    budget = 1.0 if PRESSES[args.method] is None else args.budget
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    ids = torch.randint(10, 10_000, (args.batch, args.context), generator=torch.Generator().manual_seed(args.seed))
    argv = [args.model.name if word == str(args.model) else word for word in sys.argv[1:]]
    about = {
        "peer": "kvpress",
        "versions": {
            "kvpress": version("kvpress"),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "model": args.model.name,
        "context": args.context,
        "batch": args.batch,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *argv]),
    }
    if out is not None:
        take_turns(model, ids, about, out)
        return
    Decoding(model, press_for(args.method, budget), ids[:, :512]).steps(2)  # warms up
    others, rounds = machine.Elsewhere(), []
    for _ in range(args.rounds):
        batch = Decoding(model, press_for(args.method, budget), ids)
        rounds.append((batch.read_seconds, batch.steps(args.new_tokens), batch.kv_bytes))
        del batch
    elsewhere = others.cores()
    reads = [read for read, _, _ in rounds]
    step = statistics.median(taken for _, steps, _ in rounds for taken in steps)
    report = {
        **about,
        "method": args.method,
        "budget": budget,
        "prefill_seconds": statistics.median(reads),
        "step_seconds": step,
        "decode_tokens_per_second": args.batch / step,
        "kv_bytes": rounds[-1][2],
        "peak_rss_bytes": machine.peak_rss(),
        "rounds": {
            "prefill_seconds": reads,
            "step_seconds": [statistics.median(steps) for _, steps, _ in rounds],
            "fastest_step_seconds": [min(steps) for _, steps, _ in rounds],
        },
        "cores_busy_elsewhere": elsewhere,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
