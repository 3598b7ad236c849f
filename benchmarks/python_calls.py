"""Python calls of one decode step for each layer, in kvfold's own files: what the interpreter costs beside the kernels.

    python benchmarks/python_calls.py --methods full,h2o --budget 0.5

Two tiny random Llamas, one with four layers more than the other, read a prompt of 64 tokens and decode; the calls of a
step are the profiler's `call` events (functions, lambdas, generators, comprehensions) whose code lies in the package.
The table has the median over the steps for both, and their difference for each layer more. No time is measured.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvfold
from kvfold.evaluation.compare import split_names, with_budget
from kvfold.evaluation.escaping import code_cell

FEW, MORE = 4, 8
"""Layers of the two models."""
PACKAGE = os.path.join(Path(kvfold.__file__).parent, "")


def tiny(layers: int) -> PreTrainedModel:
    """A random Llama, the same for the same number of layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Calls:
    """Within `with`: how many calls of kvfold's functions this thread made."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Calls":
        self.before = sys.getprofile()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self.count += frame.f_code.co_filename.startswith(PACKAGE)


@torch.no_grad()
def calls_of_a_step(model: PreTrainedModel, method: kvfold.Method, prompt: int, warm: int, steps: int) -> float:
    """Median over `steps` decode steps, after a prompt of `prompt` tokens and `warm` steps."""
    cache = kvfold.Cache(model, method)
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(3, 97, (1, prompt), generator=generator)
    counts = []
    for _ in range(1 + warm + steps):  # the prompt first
        with Calls() as calls:
            logits = model(input_ids=token, past_key_values=cache).logits
        counts.append(calls.count)
        token = logits[:, -1:].argmax(-1)
    return statistics.median(counts[-steps:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="full,h2o")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--warm", type=int, default=8, help="steps before those that are counted")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    methods = {name: with_budget(name, args.budget) for name in split_names(args.methods)}
    models = {layers: tiny(layers) for layers in (FEW, MORE)}
    rows = []
    for name, method in methods.items():
        few, more = (calls_of_a_step(m, method, args.prompt, args.warm, args.steps) for m in models.values())
        rows.append({"method": name, "few": few, "more": more, "per_layer": (more - few) / (MORE - FEW)})
    if args.json:
        print(json.dumps({"layers": [FEW, MORE], "budget": args.budget, "prompt": args.prompt, "rows": rows}, indent=2))
        return
    print(f"| method | calls, {FEW} layers | calls, {MORE} layers | calls a layer |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {code_cell(row['method'])} | {row['few']:g} | {row['more']:g} | {row['per_layer']:g} |")


if __name__ == "__main__":
    main()
