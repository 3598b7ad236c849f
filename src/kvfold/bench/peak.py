"""Peak memory of one cache, in a process of its own: a high-water mark tells nothing once another cache has run.

`measure_peak` starts it; `python -m kvfold.bench.peak JSON` is that process. It loads the model, warms up, sets the
mark back where the system lets it, reads a prompt and decodes a few tokens.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def measure_peak(
    model: str, contender: str, budget: float | int | None, *, context: int, batch: int, steps: int,
    dtype: str | None, device: str, threads: int, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Bytes of a process that reads (B, T) tokens and decodes `steps`: resident after loading, at most, and at the end.

    `added_bytes` are the most beyond what the loaded model and the compiled kernels hold: activations and the cache.
    `contender` is a method or the name of one of transformers' caches. On CUDA also the most that was allocated
    there. What a system does not tell is None. Raises RuntimeError with the last line of a process that failed.
    """
    wanted = {
        "model": model, "contender": contender, "budget": budget, "context": context, "batch": batch, "steps": steps,
        "dtype": dtype, "device": device, "threads": threads, "seed": seed,
    }  # fmt: skip
    return run_json([sys.executable, "-m", "kvfold.bench.peak", json.dumps(wanted)], contender)


def run_json(command: list[str], what: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a program prints on its last line, run with more `environment`. Raises RuntimeError if it fails."""
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"{what}: a process of its own ended with {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def high_water() -> int | None:
    """Most bytes that were resident since the mark was set back (VmHWM); None without /proc."""
    # Not getrusage: its mark is inherited from the process that started this one.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def trim() -> None:
    """Give back what the allocator kept of freed memory, or it would hide what comes next; on glibc alone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def set_back() -> bool:
    """Set the mark to what is resident now; whether the system let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _main(wanted: dict[str, Any]) -> dict[str, Any]:
    import torch

    from kvfold.bench import contenders as c
    from kvfold.evaluation.compare import with_budget
    from kvfold.evaluation.memory import resident_bytes
    from kvfold.models.load import load

    torch.set_num_threads(wanted["threads"])
    model, _ = load(wanted["model"], dtype=wanted["dtype"], device=wanted["device"], progress=False)
    own, _ = c.transformers_contenders(model)
    entrant = next((one for one in own if one.name == wanted["contender"]), None)
    if entrant is None:
        method = with_budget(wanted["contender"], wanted["budget"] if wanted["budget"] is not None else 1.0)
        (entrant,) = c.kvfold_contenders(model, [(wanted["contender"], method)])
    ids = c.draw_prompts(model, wanted["batch"], wanted["context"], wanted["seed"])

    def work(prompt: torch.Tensor, steps: int) -> int:
        cache = entrant.make()
        token, _ = c.read_prompt(model, cache, prompt)
        c.decode_steps(model, cache, token, steps)
        return c.held_bytes(cache)

    work(ids[:, :64], 2)  # compiles
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    gc.collect()
    trim()
    before, back = resident_bytes(), set_back()
    held, peak = work(ids, wanted["steps"]), high_water()
    return {
        "batch": wanted["batch"],
        "context": wanted["context"],
        "resident_before_bytes": before,
        "peak_resident_bytes": peak,
        "added_bytes": None if peak is None or before is None else peak - before,
        "peak_since_start": not back,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated(model.device) if cuda else None,
        "kv_bytes": held,
    }


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))), flush=True)
