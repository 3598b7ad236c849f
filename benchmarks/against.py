"""A decode step of this checkout beside another one's, in turns on one machine: what a rebuilding costs or gains.

    git worktree add /tmp/before 5f061d4
    python benchmarks/against.py /tmp/before --methods "full,h2o(budget=128)" --context 256 --batch 1

Each turn is a process of its own that loads the model, reads random tokens in chunks, and decodes; which checkout goes
first changes from turn to turn. Prints the median step of every turn, the median over turns, and its ratio to the
other's. Ratios on a busy machine mean little: look at how far turns differ.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

WORK = """
import json, sys, time
from statistics import median
import torch, kvfold
name, methods, context, batch, steps, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model, _ = kvfold.load(name, progress=False)
ids = torch.randint(10, 9000, (batch, context), generator=torch.Generator().manual_seed(0))
token, found = torch.full((batch, 1), 11), {}
with torch.no_grad():
    for method in methods:
        cache, taken = kvfold.Cache(model, method), []
        for start in range(0, context, 1000):
            with cache.prefilling():
                model(ids[:, start : start + 1000], past_key_values=cache, logits_to_keep=1)
        for _ in range(steps + 3):
            start = time.perf_counter()
            model(token, past_key_values=cache)
            taken.append(time.perf_counter() - start)
        found[method] = median(taken[3:])
print(json.dumps(found))
"""


def turn(checkout: Path, given: list[object]) -> dict[str, float]:
    """Seconds of a step by method, in a process that imports kvfold from a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    command = [sys.executable, "-c", WORK, json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout of kvfold")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", default="full,h2o(budget=128)", help="texts, separated by ';' or ','")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not (args.other / "src/kvfold").is_dir():
        parser.error(f"other={args.other} must be a checkout of kvfold")
    methods = args.methods.split(";" if ";" in args.methods else ",")
    given = [args.model, methods, args.context, args.batch, args.steps, args.threads]
    places = {"other": args.other, "this": Path(__file__).parents[1]}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    for number in range(args.rounds):
        for name in list(places)[:: 1 if number % 2 else -1]:
            taken[name].append(turn(places[name], given))
            print(f"round {number + 1}, {name}: {taken[name][-1]}", file=sys.stderr)
    rows = []
    for method in methods:
        steps = {name: [1e3 * each[method] for each in turns] for name, turns in taken.items()}
        ours, theirs = median(steps["this"]), median(steps["other"])
        rows.append({"method": method, "this_ms": ours, "other_ms": theirs, "ratio": ours / theirs, "turns": steps})
    if args.json:
        print(json.dumps({"context": args.context, "batch": args.batch, "rows": rows}))
        return
    print("| method | this, ms | other, ms | of the other's | turns, this | turns, other |")
    print("| --- | ---: | ---: | ---: | --- | --- |")
    for row in rows:
        turns = [" ".join(f"{ms:.1f}" for ms in row["turns"][name]) for name in ("this", "other")]
        numbers = f"{row['this_ms']:.1f} | {row['other_ms']:.1f} | {row['ratio']:.2f}"
        print(f"| `{row['method']}` | {numbers} | {turns[0]} | {turns[1]} |")


if __name__ == "__main__":
    main()
