"""A context that is larger than the memory for it: tokens, resident memory and time, from disk and in memory.

    python benchmarks/spill.py
    python benchmarks/spill.py --context 4096 --layers 4 --tokens 8 --methods full

A random Llama (`--layers` of 4 KV heads of 64) reads `--context` random tokens and says `--tokens` more, greedily, for
each method in memory, and with a `fast_memory` of a `--share`th of what a dense cache of the prompt takes. Each run is
a process of its own, in which the C library gives back whatever of 1 MiB or more is freed. Printed: whether the tokens
are those of memory; by how much the process's resident memory (anonymous, and mapped of files) has grown at its peak,
in the prompt and in the tokens behind it; milliseconds a token, the median; and of the blocks that a token reads how
many are in memory already, and what is moved for it.

`cold`: before each token the file is brought to the disk and dropped from the system's own memory, so that whatever is
read comes from the disk; else the system keeps what it has room for, which is not the process's.

`nothing kept` is `streamingllm` with 64 tokens, in memory: what the pass over a prompt takes by itself. A run with a
limit may take that, the limit, and `SLACK` on top; one that takes more, or says other tokens, ends this with 1.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvfold
from kvfold.evaluation.memory import resident_bytes
from kvfold.files import write_json

VOCAB, HEADS, KV_HEADS, WIDTH = 512, 8, 4, 64
NOTHING = "streamingllm(budget=64)"
SLACK = 24 << 20
"""Bytes: blocks on their way, the allocator's rest."""
WARM = 300
"""Tokens that are read before anything is measured."""
MIB = 1 << 20


def build(layers: int, context: int) -> PreTrainedModel:
    """A random model with peaked attention, so that a token that is read wrong is another token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=WIDTH, max_position_embeddings=2 * context, initializer_range=0.08,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def peak_since() -> int:
    """The most resident memory since the last call, and a new beginning."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@torch.no_grad()
def measure(method: str, context: int, layers: int, tokens: int, limit: int | None, spill: str, cold: bool) -> Any:
    """One run, in this process."""
    model = build(layers, context)
    ids = torch.randint(VOCAB, (1, context), generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {} if limit is None else {"fast_memory": limit, "spill": spill}
    cache = kvfold.Cache(model, method, **given)
    memory = cache.fast
    model(ids[:, :WARM], past_key_values=cache, logits_to_keep=1)
    cache.reset()
    gc.collect()
    before = resident_bytes() or 0
    peak_since()
    start = time.perf_counter()
    chosen = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    prefill, prompt_peak = time.perf_counter() - start, peak_since()
    gc.collect()
    resident_bytes()
    peak_since()
    said, seconds = [int(chosen)], list[float]()
    moved = (0, 0, 0, 0) if memory is None else counts(memory.residency)
    for _ in range(tokens - 1):
        if cold and memory is not None:
            os.fdatasync(memory.file.file)
            os.posix_fadvise(memory.file.file, 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        chosen = model(chosen, past_key_values=cache).logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
        said.append(int(chosen))
    steps = len(seconds)
    hits, misses, brought, written = (0,) * 4 if memory is None else (
        now - then for now, then in zip(counts(memory.residency), moved, strict=True)
    )  # fmt: skip
    return {
        "said": said, "nbytes": cache.nbytes, "held": cache.resident_nbytes, "prefill_s": prefill,
        "prompt_peak": prompt_peak - before, "decode_peak": peak_since() - before, "ms": 1e3 * median(seconds),
        "hit_rate": hits / max(1, hits + misses), "brought": brought / steps, "written": written / steps,
    }  # fmt: skip


def counts(residency: Any) -> tuple[int, int, int, int]:
    """What was counted so far."""
    return residency.hits, residency.misses, residency.brought_nbytes, residency.written_nbytes


def alone(**given: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(given)], check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a limit or a token is not what it has to be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--share", type=int, default=4)
    parser.add_argument("--methods", default="full;quest(budget=1024)")
    parser.add_argument("--spill", default=tempfile.gettempdir())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return 0
    dense = options.context * options.layers * KV_HEADS * 2 * WIDTH * 4
    common = {"context": options.context, "layers": options.layers, "tokens": options.tokens, "spill": options.spill}
    limit, wrong = dense // options.share, list[str]()
    print(f"{options.context} tokens, {dense / MIB:.0f} MiB dense, fast_memory {limit / MIB:.0f} MiB")
    print(
        "run | tokens | MiB: cache, held, peak of the prompt, of decoding | prompt s | ms a token | hits | MiB in, out"
    )
    rest = alone(method=NOTHING, limit=None, cold=False, **common)
    rows = {"nothing kept": rest}
    print(line("nothing kept", rest, "-"), flush=True)
    for method in options.methods.split(";"):
        known = alone(method=method, limit=None, cold=False, **common)
        for name, some, cold in (("in memory", None, False), ("from disk", limit, False), ("cold", limit, True)):
            row = known if some is None else alone(method=method, limit=some, cold=cold, **common)
            same = row["said"] == known["said"]
            rows[f"{method}, {name}"] = row
            print(line(f"{method}, {name}", row, "same" if same else "other"), flush=True)
            if some is not None:
                wrong += [] if same else [f"{method}, {name}: other tokens"]
                wrong += [
                    f"{method}, {name}: {which} is {row[which] / MIB:.0f} MiB"
                    for which in ("prompt_peak", "decode_peak")
                    if row[which] > rest[which] + limit + SLACK
                ]
    if options.json:
        write_json(options.json, {"limit": limit, "dense": dense, "rows": rows}, argument="json")
    for each in wrong:
        print(f"wrong: {each}", file=sys.stderr)
    return 1 if wrong else 0


def line(name: str, row: dict[str, Any], tokens: str) -> str:
    """A row of the table."""
    sizes = ", ".join(f"{row[which] / MIB:.0f}" for which in ("nbytes", "held", "prompt_peak", "decode_peak"))
    moved = f"{row['brought'] / MIB:.1f}, {row['written'] / MIB:.1f}"
    return f"{name} | {tokens} | {sizes} | {row['prefill_s']:.0f} | {row['ms']:.0f} | {row['hit_rate']:.0%} | {moved}"


if __name__ == "__main__":
    sys.exit(main())
