"""Result folders as a sweep writes them, made up from a seed: methods differ by known amounts."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NASTY = "</script><b>bold</b> & \"quotes\" 'single' <!-- 汉字、长文本 🦊 `code` | pipe"
MODELS = ("smollm2-135m-instruct", "org/base-model")
METHODS = {"kvmerger": 0.92, "snapkv": 0.85, "h2o": 0.7, "snapkv(window=32) | kivi(bits=2)": 0.8, "streamingllm": 0.4}
BUDGETS = (0.1, 0.25, 0.5, 512)
LENGTHS = (1024, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCORED = ("niah", "ruler/vt")


def context_of(rng: random.Random, needle: str, depth: float, sentences: int) -> str:
    """Running text with a sentence at a depth."""
    words = ("the", "river", "ran", "past", "an", "old", "mill", "where", "nobody", "lived", "since", "河边", "stones")
    parts = [" ".join(rng.choices(words, k=12)).capitalize() + "." for _ in range(sentences)]
    parts.insert(round(depth * sentences), needle)
    return "\n".join(parts)


def example_line(model: str, task: str, length: int | None, number: int) -> dict[str, Any]:
    """A line of examples.jsonl."""
    rng = random.Random(f"{task}/{length}/{number}")
    key, depth = str(rng.randint(1_000_000, 9_999_999)), DEPTHS[number % len(DEPTHS)]
    context = context_of(rng, f"The secret number is {key}. {NASTY}", depth, (length or 2048) // 24)
    query = {"text": f"What is the secret number? {NASTY}", "prefix": "It is", "answers": [key], "info": {}}
    metric = "agreement" if task == "agreement" else "contains_all"
    return {
        "model": model, "task": task, "length": length, "example": f"{task}-{length}-{number}", "context": context,
        "info": {"depth": depth} if task == "niah" else {},
        "queries": [{**query, "metric": metric} for _ in range(2 if task == "ruler/vt" else 1)],
    }  # fmt: skip


def result_line(
    example: dict[str, Any], protocol: str, method: str, budget: float | int | None, rng: random.Random
) -> dict[str, Any]:
    """A line of results.jsonl: quality grows with the method's strength and the budget, and falls with the length."""
    length = example["length"] or 2048
    share = 1.0 if budget is None else budget if isinstance(budget, float) else budget / length
    chance = 0.97 if method == "full" else METHODS[method] * (0.45 + 0.55 * min(1.0, share) ** 0.4)
    chance -= 0.04 * (length > 2000) + 0.05 * (protocol == "agnostic" and method != "full")
    answers = []
    for query in example["queries"]:
        right = rng.random() < chance
        said = query["answers"][0] if right else f"not {rng.randint(10, 99)} {NASTY}"
        scores: dict[str, float] = {"score": float(right)}
        if query["metric"] == "agreement":
            kl = 0.0 if method == "full" else rng.uniform(0.5, 1.5) * 0.3 * (1.05 - chance)
            scores = {"kl": kl, "top1": 1 - kl / 2, "nll": 2.0 + kl, "nll_full": 2.0, "tokens": 64}
        answers.append({"prediction": said, "scores": scores, "tokens": 8})
    bins = [min(1.0, max(0.0, share + rng.uniform(-0.3, 0.3))) if share < 1 else 1.0 for _ in range(64)]
    bins[0] = bins[-1] = 1.0
    full = length * 1536
    return {
        "model": example["model"], "dtype": "float32", "task": example["task"], "length": example["length"],
        "protocol": protocol, "example": example["example"], "method": method, "budget": budget,
        "prompt_tokens": length, "kept_tokens": min(1.0, share) * length, "full_nbytes": full,
        "nbytes": int(full * min(1.0, share) * (0.3 if "kivi" in method else 1.0)), "kept": bins, "queries": answers,
        "timing": {
            "prefill_seconds": 0.5 + length / 9000, "decode_tokens": 8,
            "decode_seconds": 8 * (0.02 + 0.03 * min(1.0, share)) * rng.uniform(0.95, 1.05),
        },
    }  # fmt: skip


def lines_of(
    models: Sequence[str], protocols: Sequence[str], lengths: Sequence[int | None], samples: int, tasks: Sequence[str]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each example with its results."""
    contenders = [("full", None), *((method, budget) for method in METHODS for budget in BUDGETS)]
    for model in models:
        for task in tasks:
            for length in lengths:
                for number in range(samples):
                    example = example_line(model, task, length, number)
                    rng = random.Random(f"{model}/{example['example']}")
                    yield example, [
                        result_line(example, protocol, method, budget, rng)
                        for protocol in protocols for method, budget in contenders
                    ]  # fmt: skip


def write_folder(
    folder: Path, *, models: Sequence[str] = MODELS[:1], protocols: Sequence[str] = ("agnostic",),
    lengths: Sequence[int | None] = LENGTHS, samples: int = 10, tasks: Sequence[str] = (*SCORED, "agreement"),
    failures: bool = True,
) -> Path:  # fmt: skip
    """A result folder; `failures`: h2o fails on the second example of each task and length."""
    folder.mkdir(parents=True)
    about = {"sweep": {"name": NASTY, "tasks": list(tasks)}, "versions": {"kvfold": "0"}, "machine": {"cores": 2}}
    (folder / "sweep.json").write_text(json.dumps(about), encoding="utf-8")
    examples, results = [], []
    for example, records in lines_of(models, protocols, lengths, samples, tasks):
        examples.append(example)
        for record in records:
            if failures and record["method"] == "h2o" and record["example"].endswith("-1"):
                key = ("model", "dtype", "task", "length", "protocol", "example", "method", "budget")
                record = {**{name: record[name] for name in key}, "error": f"ValueError: <b>no room</b> {NASTY}"}
            results.append(record)
    for name, lines in (("examples.jsonl", examples), ("results.jsonl", results)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
