"""Peers with an environment of their own: kvpress, run by its Python through benchmarks/peers/kvpress_peer.py."""

import ast
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kvfold
from kvfold.bench.contenders import DYNAMIC
from kvfold.bench.endtoend import RunRow
from kvfold.bench.peak import run_json

SCRIPT = Path("benchmarks/peers/kvpress_peer.py")


def find_script() -> Path:
    """The peer's script in the checkout of the current folder, else in kvfold's own. Raises ValueError."""
    here = Path.cwd()
    places = [here, *here.parents, *Path(kvfold.__file__).resolve().parents[2:3]]
    found = next((place / SCRIPT for place in places if (place / SCRIPT).is_file()), None)
    if found is None:
        raise ValueError(f"peer-python needs {SCRIPT}, which is in no checkout at or above {str(here)!r}")
    return found


def known_methods(script: Path) -> list[str]:
    """The methods that the script has a press for: the keys of its PRESSES, read without running it."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "PRESSES"
            and isinstance(node.value, ast.Dict)
        ):
            return [
                key.value for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
            ]
    raise ValueError(f"{str(script)!r} has no dictionary PRESSES of methods")


def check_python(python: str) -> None:
    """Raise ValueError unless this is an interpreter that can import kvpress."""
    path = shutil.which(python)
    if path is None:
        raise ValueError(f"peer-python={python!r} is not a program")
    done = subprocess.run([path, "-c", "import kvpress"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"peer-python={python!r} can't import kvpress: {last}")


def run_kvpress(
    python: str, script: Path, folder: Path, method: str, budget: float | int | None, *, context: int, batch: int,
    dtype: str, steps: int, rounds: int, threads: int, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The peer's report (benchmarks/peers/README.md). A budget in tokens becomes a fraction of the context.

    Raises RuntimeError with the last line of a run that failed.
    """
    share = 1.0 if budget is None else budget if isinstance(budget, float) else min(1.0, budget / context)
    options = {
        "model": folder, "method": method, "budget": share, "context": context, "batch": batch, "dtype": dtype,
        "new-tokens": steps, "rounds": rounds, "seed": seed,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return run_json([python, str(script), *words], f"kvpress {method}", {"OMP_NUM_THREADS": str(threads)})


def kvpress_rows(
    python: str, script: Path, folder: Path, methods: Sequence[tuple[str, float | int | None]], *,
    rows: Sequence[RunRow], weights: int, bandwidth: float, context: int, batch: int, prefill_batch: int, dtype: str,
    steps: int, rounds: int, threads: int, tick: Callable[[str], None] = lambda _: None,
) -> tuple[list[RunRow], list[dict[str, str]]]:  # fmt: skip
    """A row for each method (slug, budget) that kvpress has, and those left out, each with its reason.

    `rows` are this run's own, `weights` in bytes and `bandwidth` in bytes/s: a peer's bound and its ratios to
    DynamicCache come from them. Where the timed prefills have another batch, a second run reads that one.
    """
    dense = next(row for row in rows if row.contender == DYNAMIC)
    assert dense.decode is not None
    known, found, skipped = known_methods(script), [], []
    for method, budget in methods:
        if method not in known:
            skipped.append({"contender": f"kvpress {method}", "reason": f"{script.name} has no press of this name"})
            continue

        def run(size: int, new: int, method: str = method, budget: float | int | None = budget) -> dict[str, Any]:
            tick(f"kvpress {method}, batch {size}, in a process of its own")
            return run_kvpress(
                python, script, folder, method, budget, context=context, batch=size, dtype=dtype, steps=new,
                rounds=rounds, threads=threads,
            )  # fmt: skip

        try:
            got = run(batch, steps)
            if dense.prefill is not None:
                alone = dict(got) if prefill_batch == batch else run(prefill_batch, 1)
                ratio = alone["prefill_seconds"] / dense.prefill.seconds.median
                got["prefill_run"] = {**alone, "ratio_dynamic": ratio}
        except RuntimeError as error:  # the others' results shall not go with it
            skipped.append({"contender": f"kvpress {method}", "reason": str(error)})
            continue
        got["bound_seconds"] = (weights + got["kv_bytes"]) / bandwidth
        got["bound_tokens_per_second"] = batch / got["bound_seconds"]
        got["of_bound"] = got["bound_seconds"] / got["step_seconds"]
        got["kv_ratio"] = got["kv_bytes"] / dense.decode.kv_bytes
        got["speedup"] = dense.decode.step_seconds.median / got["step_seconds"]
        found.append(RunRow(method, "kvpress", budget, separate_process=True, peer=got))
    return found, skipped
