"""What has to be seen on a GPU, in at most ten minutes: the CUDA tests, then benchmarks, and dated results.

    make gpu-check                          # or: python benchmarks/gpu_check.py --minutes 10 --out benchmarks/results

Runs the tests that need a CUDA device, `kvfold bench kernels --device cuda`, the same over formats whose codes kernels
read, and `kvfold bench run --device cuda`, each in a process of its own that is stopped when its share of the time is
over. The results are named by the GPU and the day: `gpu-NAME-DAY-kernels.json`, `-formats.json`, `-run.json`,
`-tests.txt`, and `gpu-NAME-DAY.md`, a short table of them.

Ends with 0 where all went well, 1 where a test failed or a part did not come to its end (its results are written all
the same), 2 for wrong usage, and 3, at once and with nothing written, where there is no GPU.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.files import write_whole

ROOT = Path(__file__).parents[1]
NO_GPU = 3
TESTS = (
    "tests/hf/test_cuda.py",
    "tests/hf/test_graph.py",
    "tests/hf/test_host_memory.py",
    "tests/ops/test_gpu_glue.py",
    "tests/ops/test_triton_codes.py",
    "tests/ops/test_triton_formats.py",
    "tests/ops/test_triton_fp8.py",
    "tests/ops/test_triton_kernels.py",
    "tests/ops/test_triton_sparse.py",
    "tests/ops/test_triton_tokens.py",
)
FORMATS = "kivi(bits=8),kivi(bits=4),kivi(bits=2),fp8,turboquant,mustafar"
SHARES = {"tests": 0.5, "kernels": 0.2, "formats": 0.1, "run": 0.2}
"""Of the minutes; what a part does not use is there for those that follow."""
LAST = 4000
"""Characters that are kept of what a part that failed said."""


@dataclass(frozen=True)
class Part:
    """One program: what came of it (passed, failed, stopped), its seconds, and what it printed."""

    name: str
    outcome: str
    seconds: float
    output: str


def gpu_name() -> str | None:
    """The first CUDA device, as its driver names it; None where there is none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def stem(name: str, day: datetime.date) -> str:
    """What the files of a GPU and a day begin with."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"gpu-{words or 'unnamed'}-{day.isoformat()}"


def commands(model: str, dtype: str, out: Path, start: str) -> dict[str, list[str]]:
    """The programs, in their order."""
    bench = [sys.executable, "-m", "kvfold", "bench"]
    tests = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--strict-markers --strict-config", *TESTS]
    shape = ["--kv-heads", "8", "--group", "4", "--head-dim", "128"]
    kernels = ["--context", "1024,8192,32768", "--batch", "1,8", *shape, "--ragged"]
    coded = ["--context", "8192", "--batch", "8", *shape, "--no-scattered", "--rounds", "5", "--formats", FORMATS]
    whole = ["--methods", "full,kvfold,snapkv,h2o", "--budget", "0.2", "--context", "4096", "--batch", "8"]
    return {
        "tests": tests,
        "kernels": [*bench, "kernels", "--device", "cuda", "--dtype", "bfloat16,float16,float32", *kernels,
                    "--out", str(out / f"{start}-kernels.json")],
        "formats": [*bench, "kernels", "--device", "cuda", "--dtype", "bfloat16", *coded,
                    "--out", str(out / f"{start}-formats.json")],
        "run": [*bench, "run", "--device", "cuda", "--model", model, "--dtype", dtype, *whole, "--rounds", "3",
                "--out", str(out / f"{start}-run.json")],
    }  # fmt: skip


def allowed(name: str, total: float, used: float) -> float:
    """Seconds for a part: its share of what is left among those that have not run."""
    names = list(SHARES)
    left = sum(SHARES[each] for each in names[names.index(name) :])
    return max(1.0, (total - used) * SHARES[name] / left)


def run_part(name: str, command: Sequence[str], seconds: float) -> Part:
    """Run a program for so long at most."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
        )
        outcome, said = "passed" if done.returncode == 0 else "failed", done.stdout
    except subprocess.TimeoutExpired as late:
        text = late.stdout or b""
        outcome, said = "stopped", text.decode(errors="replace") if isinstance(text, bytes) else text
    return Part(name, outcome, time.monotonic() - start, said)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark's JSON; none where it was not written."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


def page(name: str, day: datetime.date, parts: Sequence[Part], out: Path, start: str) -> str:
    """The short table of a run, in Markdown: each number beside what bounds it, on the GPU that the title names."""
    lines = [f"# {name}, {day.isoformat()}", "", "| part | outcome | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {part.name} | {part.outcome} | {part.seconds:.0f} |" for part in parts]
    tests = next((part for part in parts if part.name == "tests"), None)
    if tests is not None and tests.output.strip():
        lines += ["", f"Tests: {tests.output.strip().splitlines()[-1]}"]
    passed = {part.name for part in parts if part.outcome == "passed"}
    for part in ("kernels", "formats"):
        if part not in passed or not (rows := read_rows(out / f"{start}-{part}.json")):
            continue
        lines += ["", f"Decode attention on {name} (`{start}-{part}.json`):", ""]
        lines += ["| dtype | tokens x rows | kernel | µs | bound, µs | of a plain read | times SDPA |"]
        lines += ["| --- | ---: | --- | ---: | ---: | ---: | ---: |"]
        lines += [
            f"| {row['dtype']} | {row['context']:,} x {row['batch']} | {row['contender']}, {row['kind']} | "
            f"{row['seconds']['median'] * 1e6:.1f} | {row['bound_seconds'] * 1e6:.1f} | {row['of_bandwidth']:.2f} | "
            f"{row['of_sdpa']:.2f} |"
            for row in rows
        ]
    if "run" in passed and (rows := read_rows(out / f"{start}-run.json")):
        lines += ["", f"A model's decode step on {name} (`{start}-run.json`):", ""]
        lines += ["| cache | step, ms | bound, ms | floor, ms | times DynamicCache | at most | KV bytes of dense |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for row in rows:
            d = row["decode"]
            floor = "-" if d["floor_seconds"] is None else f"{d['floor_seconds'] * 1e3:.2f}"
            times = " | ".join(f"{seconds * 1e3:.2f}" for seconds in (d["step_seconds"]["median"], d["bound_seconds"]))
            ratios = f"{d['speedup']['median']:.2f} | {d['bound_speedup']:.2f} | {d['kv_ratio']:.3f}"
            lines.append(f"| {row['contender']} | {times} | {floor} | {ratios} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together, at most 10")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="a folder that is there")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", default=",".join(SHARES), help="which of them, separated by commas")
    args = parser.parse_args()
    if not 0 < args.minutes <= 10:
        parser.error(f"minutes={args.minutes} must be more than 0 and at most 10")
    if not args.out.is_dir():
        parser.error(f"out={str(args.out)!r} must be a folder that is there")
    wanted = args.parts.split(",")
    if unknown := [part for part in wanted if part not in SHARES]:
        parser.error(f"parts={args.parts!r} must be of {', '.join(SHARES)}, not {unknown[0]!r}")
    name = gpu_name()
    if name is None:
        print("gpu-check: there is no CUDA device here, so nothing was run and nothing written", file=sys.stderr)
        return NO_GPU
    day, began = datetime.datetime.now(tz=datetime.UTC).date(), time.monotonic()
    start, out = stem(name, day), args.out.resolve()
    parts = []
    for part, command in commands(args.model, args.dtype, out, start).items():
        if part not in wanted:
            continue
        for ending in ("json", "txt"):  # of another run on this day: it would pass for this one's
            (out / f"{start}-{part}.{ending}").unlink(missing_ok=True)
        seconds = allowed(part, 60 * args.minutes, time.monotonic() - began)
        print(f"gpu-check: {part}, at most {seconds:.0f} s: {' '.join(command)}", file=sys.stderr, flush=True)
        parts.append(run_part(part, command, seconds))
        print(parts[-1].output, flush=True)
        print(f"gpu-check: {part} {parts[-1].outcome} after {parts[-1].seconds:.0f} s", file=sys.stderr, flush=True)
        if part == "tests" or parts[-1].outcome != "passed":
            write_whole(out / f"{start}-{part}.txt", parts[-1].output[-LAST:].encode())
    write_whole(out / f"{start}.md", page(name, day, parts, out, start).encode())
    print(f"gpu-check: {out / f'{start}.md'}", file=sys.stderr)
    return 0 if all(part.outcome == "passed" for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
