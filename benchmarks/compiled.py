"""What torch.compile takes off a decode step: plain and compiled, with the model's linear layers and with fast ones.

    python benchmarks/compiled.py --methods "full,h2o(budget=0.2)" --context 1024 --batch 1,4

The four take turns in one process (A B C D, D C B A, ...), each with a cache of its own that has read the same random
tokens, and one model for each kind of linear layers. Steps alone are compiled, by `torch.compile(model.forward)`; the
first compiled step says what that took. Medians over the rounds of a round's median step.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

import kvfold
from kvfold.bench.machine import describe
from kvfold.evaluation.compare import split_names
from kvfold.evaluation.escaping import code_cell

WARM = 8
"""Untimed steps of each contender: it is compiled, twice at most, and the fast linear layers choose their ways."""


@dataclass
class Contender:
    """A way to take the steps of one cache."""

    name: str
    model: PreTrainedModel
    forward: Any
    cache: kvfold.Cache
    token: torch.Tensor
    first: float = 0.0
    """Seconds of the first step."""
    rounds: list[float] = field(default_factory=list)
    """Seconds of each round's median step."""

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""
        before, taken = self.model.forward, []
        self.model.forward = self.forward
        for _ in range(count):
            start = time.perf_counter()
            logits = self.model(input_ids=self.token, past_key_values=self.cache).logits
            self.token = logits[:, -1:].argmax(-1)
            taken.append(time.perf_counter() - start)
        self.model.forward = before
        return taken


@torch.no_grad()
def measured(models: dict[str, PreTrainedModel], method: str, args: Any, batch: int) -> list[Contender]:
    """The contenders after all rounds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 9000, (batch, args.context), generator=generator)
    contenders = []
    for kind, model in models.items():
        for way in ("plain", "compiled"):
            cache = kvfold.Cache(model, method)
            token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            forward = model.forward if way == "plain" else torch.compile(model.forward)
            contenders.append(Contender(f"{way}, {kind}", model, forward, cache, token))
    for contender in contenders:
        contender.first = contender.steps(1)[0]
        contender.steps(WARM - 1)
        print(f"{method} x {batch}, {contender.name}: first step {contender.first:.1f} s", file=sys.stderr)
    print(f"{method} x {batch}: rounds begin", file=sys.stderr)
    for number in range(args.rounds):
        for contender in contenders[:: 1 if number % 2 else -1]:
            contender.rounds.append(statistics.median(contender.steps(args.steps)))
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", default="full", help="texts, separated by ','")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", default="1,4", help="numbers, separated by ','")
    parser.add_argument("--steps", type=int, default=6, help="of each round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    models = {
        kind: kvfold.load(args.model, dtype=getattr(torch, args.dtype), progress=False)[0]
        for kind in ("own linears", "fast linears")
    }
    kvfold.fast_linears(models["fast linears"])
    rows = []
    for batch in map(int, args.batch.split(",")):
        torch._dynamo.reset()  # one graph serves all methods, and this batch alone
        for method in split_names(args.methods):
            found = measured(models, method, args, batch)
            for each in found:
                ratio = statistics.median(mine / base for mine, base in zip(each.rounds, found[0].rounds, strict=True))
                milliseconds = [1e3 * seconds for seconds in each.rounds]
                rows.append(
                    {"batch": batch, "method": method, "name": each.name, "ms": statistics.median(milliseconds),
                     "fastest": min(milliseconds), "slowest": max(milliseconds), "ratio": ratio, "first": each.first}
                )  # fmt: skip
    about = {**vars(args), "machine": describe(torch.device("cpu"))}
    if args.json:
        print(json.dumps({**about, "rows": rows}, indent=2))
        return
    print(f"{args.model}, {args.dtype}, {args.context} tokens; {about['machine']}\n")
    print("| batch | method | step | ms | of plain | first step, s |\n| ---: | --- | --- | ---: | ---: | ---: |")
    for row in rows:
        spread = f"{row['ms']:.1f} ({row['fastest']:.1f} to {row['slowest']:.1f})"
        print(
            f"| {row['batch']} | {code_cell(row['method'])} | {row['name']} | {spread} | {row['ratio']:.2f} "
            f"| {row['first']:.0f} |"
        )


if __name__ == "__main__":
    main()
