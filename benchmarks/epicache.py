"""EpiCache's episodes beside one cache in blocks: peak KV of the build against its bound, time, questions answered.

    .venv/bin/python benchmarks/epicache.py --length 7500 --budget 1024 --block 512

The conversation is made (`kvfold eval`'s task `conversation`): two persons, several sessions, facts among small talk.
All contenders read it through `kvfold.conversations.episodes.Episodes`, the others as a single episode.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

import kvfold
from kvfold.conversations.episodes import Episodes
from kvfold.conversations.topics import Turn
from kvfold.evaluation.examples import Example
from kvfold.evaluation.metrics.base import get_metric
from kvfold.evaluation.tasks.base import Setting
from kvfold.evaluation.tasks.conversation_made import conversation


def turns_of(context: str) -> tuple[str, list[Turn]]:
    """What stands before the first session, and the lines said; a session's head goes with its first line."""
    opening, *lines = context.splitlines(keepends=True)
    turns: list[Turn] = []
    head = ""
    for line in lines:
        if ' said, "' in line:
            turns.append((head + line).removesuffix("\n"))
            head = ""
        else:
            head += line
    return opening, turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--length", type=int, default=7500, help="tokens of the conversation, questions and answers")
    parser.add_argument("--budget", type=int, default=1024, help="tokens per head")
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--chats", type=int, default=1)
    parser.add_argument("--power", type=float, default=1.1)
    parser.add_argument("--methods", default="full,epicache,epicache-layers,snapkv")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model, tokenizer = kvfold.load(args.model, device=args.device)
    setting = Setting(tokenizer, length=args.length, samples=args.chats)
    chats = list(conversation(setting, sessions=6, queries=args.queries))
    contenders = {
        "full": ("full", 1, args.length),
        "epicache": (f"epicache(budget={args.budget})", args.episodes, args.budget),
        "epicache-layers": (
            f"epicache(budget={args.budget}, power={args.power}, floor=0.25)",
            args.episodes,
            args.budget,
        ),
        "snapkv": (f"snapkv(budget={args.budget})", 1, args.budget),
        "kvzip": (f"kvzip(budget={args.budget})", 1, args.budget),
    }
    results: dict[str, list[dict[str, float]]] = {}
    for name in args.methods.split(","):
        method, episodes, budget = contenders[name]
        results[name] = [measure(model, tokenizer, chat, method, episodes, budget, args) for chat in chats]
    print(f"\n{args.model}, {args.chats} chat(s) of {args.length} tokens, budget {args.budget}, block {args.block}\n")
    print("| contender | peak tokens/head | budget + block + patch | peak MB | MB | build s | answer s | F1 | found |")
    print("| --- |" + " --- |" * 8)
    for name, found in results.items():
        mean = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
        print(
            f"| {name} | {mean['peak']:.0f} | {mean['bound']:.0f} | {mean['peak_mb']:.1f} | {mean['held_mb']:.1f} | "
            f"{mean['build']:.1f} | {mean['answer']:.2f} | {mean['f1']:.3f} | {mean['found']:.0%} |"
        )
    if args.out:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "versions": {each: version(each) for each in ("torch", "transformers", "scikit-learn")},
        }
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(args.out)


def measure(model, tokenizer, chat: Example, method: str, episodes: int, budget: int, args) -> dict[str, float]:
    """Build the episodes of one chat and put its questions to them."""
    opening, turns = turns_of(chat.context)
    start = time.perf_counter()
    made = Episodes(model, tokenizer, turns, method, block=args.block, episodes=episodes, opening=opening)
    build, start = time.perf_counter() - start, time.perf_counter()
    print(f"{method}: {len(made.episodes)} built in {build:.0f} s, peak {made.peak_tokens:.0f} tokens", file=sys.stderr)
    f1, found = [], []
    for query in chat.queries:
        said = made.answer(f"{query.text.strip()} {query.prefix}".strip(), query.max_new_tokens)
        said = said.split("\n")[0]
        f1.append(get_metric(query.metric)(said, query)["score"])
        found.append(any(answer.lower() in said.lower() for answer in query.answers))
        print(f"{method} | {query.text.strip()[-60:]!r} | {said!r} | {query.answers}", file=sys.stderr)
    return {
        "peak": made.peak_tokens, "bound": budget + args.block + made.patch_tokens, "peak_mb": made.peak_nbytes / 1e6,
        "held_mb": made.nbytes / 1e6, "build": build, "answer": (time.perf_counter() - start) / len(chat.queries),
        "f1": float(np.mean(f1)), "found": float(np.mean(found)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
