"""How far kvfold keeps the positions that NVIDIA's kvpress keeps, with equal parameters on the same token ids.

    python benchmarks/parity/parity.py --kept kept.npz --out benchmarks/results/parity-kvpress-smollm2.json

`--kept` is what kvpress_kept.py wrote (README.md has both commands, and why pairs differ). For each pair of a press
and a method, A are the positions that a KV head of a layer keeps in kvpress and B those in kvfold: the table shows
the mean over documents, layers and heads of |A and B| / |A| and of |A and B| / |A or B|, and the lowest layer and
head of the first.
"""

import argparse
import json
import platform
import sys
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import kvfold
from kvfold.evaluation.compare import with_budget
from kvfold.evaluation.escaping import code_cell, in_markdown
from kvfold.hf.shared_prefill import prefill_many
from kvfold.methods.base import Method
from kvfold.methods.registry import parse

WINDOW_32 = "snapkv(window=32, kernel=5)"
PAIRS: list[tuple[str, str, bool]] = [
    ("SnapKV", WINDOW_32, False),
    ("SnapKV, window 64", "snapkv(window=64, kernel=5)", False),
    ("TOVA", "tova", False),
    ("TOVA, newest competes", "tova", True),
    ("StreamingLLM", "streamingllm(sinks=4)", False),
    ("ObservedAttention", "h2o(recent=0.0)", False),
    ("ObservedAttention, summed", "h2o(recent=0.0)", True),
    ("ObservedAttention", "h2o", False),
    ("ObservedAttention, summed, recent half", "h2o", True),
    ("ExpectedAttention", "expected-attention", False),
    ("ExpectedAttention, epsilon 0.02", "expected-attention(epsilon=0.02)", False),
    ("PyramidKV", f"pyramidkv(score='{WINDOW_32}', beta=20.0)", False),
    ("PyramidKV", WINDOW_32, False),
    ("PyramidKV, window outside", f"pyramidkv(score='{WINDOW_32}', beta=20.0)", True),
    ("AdaKV of SnapKV", f"adakv(score='{WINDOW_32}', floor=0.2)", False),
    ("AdaKV of SnapKV, no floor", f"adakv(score='{WINDOW_32}', floor=0.0)", False),
    ("AdaKV of SnapKV, blend", f"adakv(score='{WINDOW_32}', floor=0.2)", True),
    ("AdaKV of ExpectedAttention", "adakv(score='expected-attention', floor=0.2)", False),
    ("AdaKV of ExpectedAttention, no floor", "adakv(score='expected-attention', floor=0.0)", False),
    ("KVzip", "kvzip(prefix=4)", False),
    ("KVzip, whole prompt", "kvzip(prefix=4)", True),
    ("DuoAttention, given gates", "duoattention(sinks=64, recent=256)", False),
]
"""Press, method, and whether the press was changed to prove a reason."""


def made(text: str, budget: float, gates: np.ndarray) -> Method | None:
    """The method at a budget; without one, as many streaming heads as make up for it. None: kvfold lacks it."""
    try:
        method = parse(text)
    except ValueError as error:
        print(f"{text}: {error}", file=sys.stderr)
        return None
    if any(option.name == "gates" for option in fields(method)):
        return replace(method, sparsity=1 - budget, gates=tuple(map(tuple, gates.tolist())))
    return with_budget(text, budget)


def positions(cache: kvfold.Cache, tokens: int) -> np.ndarray:
    """What a cache keeps of a prompt of one row, as a mask (L, H, T)."""
    kept = [cache.kept(layer)[0] for layer in range(len(cache.layers))]
    mask = np.zeros((len(kept), len(kept[0]), tokens), dtype=bool)
    for at, heads in zip(mask, kept, strict=True):
        for row, held in zip(at, heads, strict=True):
            row[held] = True
    return mask


def measure(theirs: np.ndarray, ours: np.ndarray) -> dict[str, np.ndarray]:
    """Masks (N, L, H, T) compared: for each layer and KV head (L, H) the mean over the N documents."""
    both, either = (theirs & ours).sum(-1), (theirs | ours).sum(-1)
    own = theirs.sum(-1)
    return {
        "of_kvpress": (both / own.clip(1)).mean(0),
        "of_either": (both / either.clip(1)).mean(0),
        "kept_kvpress": own.mean(0),
        "kept_kvfold": ours.sum(-1).mean(0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--kept", type=Path, required=True, help="what kvpress_kept.py wrote")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    with np.load(args.kept) as held:
        theirs = dict(held)
    about, gates = json.loads(str(theirs["about"])), theirs["gates"]
    tokens, budgets = about["tokens"], about["budgets"]
    model, _ = kvfold.load(args.model)
    if model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype}; kvpress_kept.py ran in float32")
    chosen = {
        f"{text}|{budget}": method
        for text in dict.fromkeys(text for _, text, _ in PAIRS)
        for budget in budgets
        if (method := made(text, budget, gates)) is not None
    }
    ours: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    for document in about["documents"]:
        ids = torch.from_numpy(theirs[f"ids|{document}"])[None]
        caches = [kvfold.Cache(model, method) for method in chosen.values()]
        prefill_many(model, {"input_ids": ids}, caches, logits_to_keep=1)
        for name, cache in zip(chosen, caches, strict=True):
            ours[name].append(positions(cache, ids.shape[1]))
        print(f"{document}: {len(caches)} caches", file=sys.stderr, flush=True)

    rows = []
    for press, text, changed in PAIRS:
        for budget in budgets:
            if f"{text}|{budget}" not in ours or press not in about["presses"]:
                continue
            packed = [theirs[f"{document}|{press}|{budget}"] for document in about["documents"]]
            masks = np.stack([np.unpackbits(each, axis=-1, count=tokens).astype(bool) for each in packed])
            found = measure(masks, np.stack(ours[f"{text}|{budget}"]))
            rows.append({"press": press, "method": text, "changed": changed, "budget": budget, **found})
    table(rows, budgets)
    if args.out:
        words = [args.kept.name if word == str(args.kept) else word for word in sys.argv]
        save(args.out, " ".join(["python", *words]), about, rows)


def table(rows: list[dict], budgets: list[float]) -> None:
    """One line for each pair; a cell is: of kvpress's (the lowest head), of either's; tokens kept by each."""
    print("| kvpress | kvfold | " + " | ".join(f"{budget:.0%} kept" for budget in budgets) + " |")
    print("| --- | --- |" + " --- |" * len(budgets))
    for pair in dict.fromkeys((row["press"], row["method"], row["changed"]) for row in rows):
        cells = []
        for row in (row for row in rows if (row["press"], row["method"], row["changed"]) == pair):
            share, either = row["of_kvpress"], row["of_either"]
            sizes = f"{row['kept_kvpress'].mean():.1f} / {row['kept_kvfold'].mean():.1f}"
            cells.append(f"{share.mean():.2%} (lowest {share.min():.1%}), {either.mean():.2%}; {sizes}")
        print(f"| {in_markdown(pair[0])}{' *' if pair[2] else ''} | {code_cell(pair[1])} | " + " | ".join(cells) + " |")


def save(path: Path, command: str, about: dict, rows: list[dict]) -> None:
    """Everything: agreement by layer and KV head, tokens kept by layer."""
    lines = []
    for row in rows:
        shares = {name: row[name].round(4).tolist() for name in ("of_kvpress", "of_either")}
        sizes = {name: row[name].mean(1).round(2).tolist() for name in ("kept_kvpress", "kept_kvfold")}
        named = {name: row[name] for name in ("press", "method", "changed", "budget")}
        named |= {f"mean_{name}": float(row[name].mean().round(6)) for name in shares}
        named |= {f"lowest_{name}": float(row[name].min().round(6)) for name in shares}
        lines.append(json.dumps({**named, **sizes, **shares}))
    report = {
        "command": command,
        "kvpress": about,
        "kvfold": {
            "versions": {name: version(name) for name in ("kvfold", "torch", "transformers")},
            "python": platform.python_version(),
        },
    }
    head, pairs = json.dumps(report, indent=1).removesuffix("\n}"), ",\n  ".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "pairs": [\n  {pairs}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
