"""What torch's threads do while they wait for a next product, and what that does to the attention behind it.

    python benchmarks/waiting.py --rounds 3

Each way is a process of its own, for torch asks once, when it is imported; they take turns. In one, seven linear layers
of SmolLM2's sizes for 8 rows come before attention over 6,000 tokens of 8 rows: medians of 40 such pairs, in ms, and of
the attention alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from kvfold.waiting import POLICY, SAID

WAYS: dict[str, dict[str, str]] = {"turning": {}, "asleep": {POLICY: "passive"}}
SIZES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""(outputs, inputs) of a decoder layer's linear layers."""
ROWS, HEADS, GROUP, SIZE, TOKENS, PAIRS = 8, 3, 3, 64, 6000, 40


def measure() -> dict[str, Any]:
    """Milliseconds in this process."""
    import torch
    from torch.nn.functional import linear

    from kvfold.bench.machine import describe
    from kvfold.formats import POSITION, Chunk, Dense, Spec

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    def took(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(TOKENS, dtype=torch.int32).expand(ROWS, HEADS, TOKENS)
    segments = []
    for _ in range(2):  # one leaves the caches while the other is read
        states = draw(ROWS, HEADS, TOKENS, SIZE), draw(ROWS, HEADS, TOKENS, SIZE)
        chunk = Chunk(*states, torch.ones(ROWS, HEADS, TOKENS, dtype=torch.bool), {POSITION: positions})
        segments.append(Dense().open(Spec.of(chunk)))
        segments[-1].append(chunk, even=True)
    weights = [draw(*sizes) for sizes in SIZES]
    inputs = {size: draw(ROWS, size) for _, size in SIZES}
    query = draw(ROWS, HEADS, GROUP, 1, SIZE)

    def products() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    def attention(turn: int) -> float:
        return took(lambda: segments[turn % 2].attend(query, SIZE**-0.5, weights=False))

    alone = [attention(turn) for turn in range(PAIRS)]
    pairs = [(took(products), attention(turn)) for turn in range(PAIRS)]
    return {
        "alone": statistics.median(alone), "products": statistics.median(x for x, _ in pairs),
        "attention": statistics.median(x for _, x in pairs), "machine": describe(torch.device("cpu")),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help="one turn, in this process")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure()))
        return
    if given.rounds < 1:
        parser.error(f"rounds={given.rounds} must be at least 1")
    plain = {name: value for name, value in os.environ.items() if name not in SAID}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(given.rounds):
        for name, variables in WAYS.items():
            run = subprocess.run(
                [sys.executable, __file__, "--here"],
                env=plain | variables,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[name].append(json.loads(run.stdout))
    if given.json:
        print(json.dumps(found))
        return
    machine = found["turning"][0]["machine"]
    print(f"{machine['cpu']}, {machine['threads']} threads; medians of {given.rounds} turns\n")
    print("| threads that wait | products, ms | attention behind them, ms | attention alone, ms |")
    print("| --- | ---: | ---: | ---: |")
    for name, turns in found.items():
        ms = (statistics.median(turn[what] for turn in turns) for what in ("products", "attention", "alone"))
        print(f"| {name} | {' | '.join(f'{x:.2f}' for x in ms)} |")


if __name__ == "__main__":
    main()
