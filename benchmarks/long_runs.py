"""What benchmarks/generation.py and benchmarks/recall.py share: contenders, documents, and a folder to go on in."""

import argparse
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from agreement import documents
from torch import Tensor

import kvfold
from kvfold.evaluation.compare import budget_of, split_names, with_budget
from kvfold.evaluation.records import Lines, read_lines
from kvfold.files import read_json, write_json
from kvfold.methods import Method


@dataclass(frozen=True)
class Contender:
    """A method by the text that asks for it, at a budget (None: it takes none, or its stages have several)."""

    name: str
    method: Method
    budget: float | int | None

    @property
    def key(self) -> str:
        """What its results are found by."""
        return f"{self.name}@{self.budget}"


def names_in(text: str) -> list[str]:
    """Methods separated by commas or semicolons; those inside parentheses belong to options, or to a method in them."""
    return [name for part in text.split(";") if part.strip() for name in split_names(part)]


def contenders(text: str, budgets: Sequence[float | int]) -> list[Contender]:
    """Each method at each budget, by budget; one that brings its own, or takes none, once and first."""
    made: dict[str, Contender] = {}
    for name in names_in(text):
        own = with_budget(name, 0.5) == with_budget(name, 0.25)
        for method in [with_budget(name, budget) for budget in (budgets[:1] if own else budgets)]:
            one = Contender(name, method, budget_of(method))
            made[one.key] = one
    order = {budget: i for i, budget in enumerate(budgets)}
    return sorted(made.values(), key=lambda one: order.get(one.budget, -1) if one.budget is not None else -1)


def numbers(text: str) -> list[float | int]:
    """Budgets: whole numbers are tokens a head, others shares of what was read."""
    return [float(each) if "." in each else int(each) for each in text.split(",")]


def long_documents(tokenizer: Any, folder: Path, tokens: int, count: int, skip: int = 0) -> list[tuple[str, Tensor]]:
    """Names and the first `tokens` ids (T,) of `count` documents that are as long, after `skip` such ones.

    Raises SystemExit where there are fewer.
    """
    found: list[tuple[str, Tensor]] = []
    for name, text in documents(folder):
        ids = tokenizer(text[: 12 * tokens], return_tensors="pt").input_ids[0, :tokens]
        if len(ids) == tokens:
            found.append((name, ids))
        if len(found) == skip + count:
            return found[skip:]
    raise SystemExit(f"--data has {len(found)} documents of {tokens} tokens, --skip and --docs ask for {skip + count}")


class RunFolder:
    """Results to go on in: `results.jsonl` has a line for each contender and unit, `run.json` says what they are about.

    A unit is a document, or a fact. The last line of several about the same counts. Raises SystemExit for a folder
    that holds results about something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], unit: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.unit = folder, unit
        self.about: dict[str, Any] = {
            **about,
            "versions": {name: version(name) for name in ("torch", "transformers")} | {"kvfold": kvfold.__version__},
        }
        path, commands = folder / "run.json", list[str]()
        if path.exists():
            before = read_json(path, str(path))
            differs = [key for key, value in self.about.items() if before.get(key) != value]
            if differs:
                raise SystemExit(f"--out={folder} holds results of another {', '.join(differs)}; name another folder")
            commands = before["commands"]
        command = shlex.join(["python", *sys.argv])
        write_json(path, {"commands": [*(one for one in commands if one != command), command], **self.about})
        self.lines = Lines(folder / "results.jsonl")
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        for record in read_lines(self.lines.path, ("contender", self.unit)):
            self.found[record["contender"], record[self.unit]] = record

    def missing(self, one: Contender, units: Iterable[str], again: bool = False) -> list[str]:
        """Those that it was not measured on yet; with `again` all."""
        return [unit for unit in units if again or (one.key, unit) not in self.found]

    def add(self, one: Contender, records: Collection[Mapping[str, Any]]) -> None:
        """Take in results, each with its unit, and see that they lie on the disk."""
        full = [{"contender": one.key, "method": one.name, "budget": one.budget, **record} for record in records]
        self.lines.append(full)
        for record in full:
            self.found[one.key, record[self.unit]] = record

    def of(self, one: Contender, units: Iterable[str]) -> list[dict[str, Any]]:
        """What was measured of it on these units, in their order."""
        return [self.found[one.key, unit] for unit in units if (one.key, unit) in self.found]


def write_table(folder: Path, summary: Mapping[str, Any], table: str) -> None:
    """`summary.json` and `table.md`."""
    write_json(folder / "summary.json", summary)
    (folder / "table.md").write_text(table, encoding="utf-8")


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder; what it holds already is not run again")
    parser.add_argument("--budgets", type=numbers, default="256,128")
    parser.add_argument("--batch", type=int, default=4, help="rows that are fed side by side")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; its own default if not given")
    parser.add_argument("--fast-linears", action="store_true", help="kvfold.fast_linears: less time, same rounding")
    parser.add_argument("--again", default="", help="methods to measure anew, of --methods")
    return parser


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer, as the options say."""
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = kvfold.load(args.model, dtype=args.dtype, device=args.device, progress=False)
    if args.fast_linears:
        kvfold.fast_linears(model)
    return model, tokenizer


def told(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)
