"""Whether a limit holds through a long generation: tokens, bytes, resident memory and step time, step by step.

    python benchmarks/limits.py --methods 'kvfold;decoding(score="snapkv");h2o' --budget 128
    python benchmarks/limits.py --methods kvfold --memory 2MiB --context 16384

A tiny random Llama reads a prompt of `--prompt` tokens in `--batch` rows and is then fed `--steps` random tokens one by
one. After every step all layers and heads of a row together may hold `--budget` tokens times their number at most, what
waits to be decided about included (a method may share tokens out among them), and with `--memory` the cache at most so
many bytes; a step that breaks it is named, and the run ends with 1. `--memory` and what goes with it, such as
`--context`, are given to `kvfold.Cache`.

Printed by thousand steps: tokens of a head, on average and of the one that holds most, and bytes, the most after any
of them, the process's resident memory at their end, and milliseconds a step, median and mean (which holds the steps at
which a method folds), and the processor's, which other programs disturb less (what looks at the step is in it). A
column is `flat` where none of its thousands after the first is more than a tenth above the least of them.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from long_runs import names_in
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvfold
from kvfold.evaluation.compare import with_budget
from kvfold.evaluation.decoding import prefill
from kvfold.evaluation.escaping import code_cell
from kvfold.evaluation.forced import fed, held_at_most, held_on_average
from kvfold.evaluation.memory import resident_bytes
from kvfold.files import write_json
from kvfold.hf.memory import parse_memory

THOUSAND, FLAT, VOCAB = 1000, 1.1, 97
MEASURES = ("tokens", "most_tokens", "nbytes", "resident", "ms", "mean_ms", "cpu_ms")


def build() -> PreTrainedModel:
    """A random model: grouped heads, peaked attention, a text as long as one likes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1 << 17, pad_token_id=0, initializer_range=0.25,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Thousand:
    """What some steps that follow each other took.

    After the worst of them: `tokens` a head on average over a row's layers and heads, `most_tokens` of one, `nbytes`.
    """

    last: int
    tokens: int
    most_tokens: int
    nbytes: int
    resident: int
    ms: float
    mean_ms: float
    cpu_ms: float


@dataclass
class Limits:
    """What may be held, None: as much as it takes; and the first step that broke it."""

    tokens: int | None
    nbytes: int | None
    broken: str = ""

    def look(self, step: int, tokens: int, nbytes: int) -> None:
        """After a step (-1: the prompt)."""
        for name, held, limit in (("tokens a head", tokens, self.tokens), ("bytes", nbytes, self.nbytes)):
            if limit is not None and held > limit and not self.broken:
                where = f"after step {step}" if step >= 0 else "after the prompt"
                self.broken = f"{held} {name} {where}, the limit is {limit}"


def thousands(
    model: PreTrainedModel, cache: kvfold.Cache, ids: Tensor, prompt: int, limits: Limits, size: int = THOUSAND
) -> Iterator[Thousand]:
    """Read a prompt of ids (B, T), feed the rest, and look at every step; one line for each `size` of them."""
    prefill(model, ids[:, :prompt], cache)
    limits.look(-1, held_on_average(cache), cache.nbytes)
    steps, tokens, most, nbytes, started = list[float](), 0, 0, 0, time.process_time()
    for step in fed(model, cache, ids[:, prompt:]):
        held, taken = held_on_average(cache), cache.nbytes
        limits.look(step.number, held, taken)
        tokens, most, nbytes = max(tokens, held), max(most, held_at_most(cache)), max(nbytes, taken)
        steps.append(1e3 * step.seconds)
        if len(steps) == size or step.number == ids.shape[1] - prompt - 1:
            spent, resident = 1e3 * (time.process_time() - started) / len(steps), resident_bytes() or 0
            yield Thousand(step.number + 1, tokens, most, nbytes, resident, median(steps), mean(steps), spent)
            steps, tokens, most, nbytes, started = [], 0, 0, 0, time.process_time()


def flat(found: Sequence[Thousand]) -> dict[str, bool]:
    """By measure: whether no thousand but the first is more than a tenth above the least of the others."""
    out = {}
    for name in MEASURES:
        values = [getattr(each, name) for each in found[1:]]
        out[name] = not values or max(values) <= FLAT * min(values)
    return out


def table(name: str, found: Sequence[Thousand], limits: Limits) -> str:
    """A method's part of what is printed."""
    lines = [
        f"{code_cell(name)}\n",
        "| to step | tokens a head at most | of one head | KB at most | resident, MB | ms a step, median | mean "
        "| processor |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in found:
        held = [each.tokens, each.most_tokens, f"{each.nbytes / 1e3:.1f}", f"{each.resident / 1e6:.1f}"]
        cells = [*held, f"{each.ms:.2f}"]
        lines.append(f"| {each.last} | " + " | ".join(map(str, cells)) + f" | {each.mean_ms:.2f} | {each.cpu_ms:.2f} |")
    said = ["flat" if each else "not flat" for each in flat(found).values()]
    return "\n".join([*lines, f"| | {' | '.join(said)} |", "", limits.broken or "The limit held at every step.", ""])


def nbytes_of(text: str) -> int:
    """Bytes of a size such as 512KiB, 2MB or 4096."""
    try:
        return int(parse_memory(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(model: PreTrainedModel, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One method's thousands, whether they are flat, and what broke."""
    ids = torch.randint(3, VOCAB, (args.batch, args.prompt + args.steps), generator=torch.Generator().manual_seed(1))
    if args.memory is None:
        cache, limits = kvfold.Cache(model, with_budget(name, args.budget)), Limits(args.budget, None)
    else:
        size = nbytes_of(args.memory)
        options = {"context": args.context} if args.context else {}
        cache, limits = kvfold.Cache(model, name, memory=size, batch=args.batch, **options), Limits(None, size)
    found = []
    for each in thousands(model, cache, ids, args.prompt, limits):
        found.append(each)
        print(f"{name}: step {each.last}", file=sys.stderr, flush=True)
    print(table(name, found, limits), flush=True)
    return {
        "method": name, "thousands": [asdict(each) for each in found], "flat": flat(found), "broken": limits.broken,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=names_in, default="streamingllm;h2o;tova")
    parser.add_argument("--budget", type=int, default=128, help="tokens a head")
    parser.add_argument("--memory", help="bytes that may be held instead, such as 2MiB: for kvfold.Cache(memory=...)")
    parser.add_argument("--context", type=int, help="tokens that the memory must do for, where the method asks")
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    args = parser.parse_args()
    model = build()
    held = f"memory {args.memory}" if args.memory else f"{args.budget} tokens a head"
    print(f"{args.batch} rows, {args.prompt} tokens of prompt, {args.steps} steps, {held}\n")
    rows = [run(model, name, args) for name in args.methods]
    if args.json:
        write_json(args.json, {"command": sys.argv, "methods": rows})
    sys.exit(any(row["broken"] for row in rows))


if __name__ == "__main__":
    main()
