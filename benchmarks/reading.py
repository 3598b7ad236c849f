"""How well methods that read few of their tokens choose them: one table for all, on real documents.

    python benchmarks/reading.py --model smollm2-135m-instruct --data ../shared/data --docs 10 --fast-linears \\
        --methods 'quest(budget=0.12);tokenselect(budget=0.12)' --out build/reading-smollm2

Protocol: a document's first `--context` tokens are read by all methods in one exact pass; its next `--tokens` are fed
one by one, and every next-token distribution is compared with the full cache's: mean KL(full || method) in nats, and
the share of equal greedy tokens. At the first `--watched` of these steps each choice is compared with the truth: of the
tokens that a query head reads in a layer, `recall` is the share that is among as many with the largest exact attention,
and `attention` how much of that they have; means over heads, layers that choose, and steps.

`read` is what a step reads of those layers, the index and the units that each KV head's lists name (those of several
query heads each for itself), over what is stored there; `index` what indexes take of all that is held but them.
Milliseconds are of a step of one row, over those that nobody looks at, and `times` the full cache's over them, of the
same document, the median of documents. Intervals: bootstrap over documents. `--out` is a folder to go on in. `kvfold
bench reading` prints the same of one text.

`--needles FOLDER`: what `kvfold eval --tasks niah --out FOLDER` found of the model with these methods is a column more,
the share of the needles and how many there were.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from long_runs import Contender, RunFolder, arguments, load, long_documents, names_in, told, write_table

from kvfold.bench.reading import measure_reading
from kvfold.evaluation.escaping import code_cell
from kvfold.evaluation.report import make_report
from kvfold.evaluation.report.cells import ALL_LENGTHS
from kvfold.evaluation.statistics import bootstrap_interval
from kvfold.methods import parse

FULL = "full"


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean and 95 % interval."""
    low, high = bootstrap_interval(list(values))
    return f"{mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def needles_in(folder: Path, model: str) -> dict[str, tuple[float, int]]:
    """Percent of the needles that each method found of a model, and how many there were. Raises ValueError for none."""
    cells = make_report([folder]).cells
    found = {
        cell.contender.method: (cell.score, cell.n)
        for cell in cells
        if cell.task == "niah" and cell.setup.model == model and cell.score is not None and cell.length != ALL_LENGTHS
    }
    if not found:
        raise ValueError(f"needles={str(folder)!r} has no results of {model} with the task niah")
    return found


def report(
    kept: RunFolder, ran: Sequence[Contender], docs: Sequence[str], needles: Mapping[str, tuple[float, int]] | None
) -> tuple[dict[str, Any], str]:
    """Summary by method, and the table, over these documents."""
    more = ("", "") if needles is None else (" needles |", " ---: |")
    lines = [
        "| method | documents | KL [95 %] | equal greedy tokens | recall | attention | read | index | ms a step "
        f"| times |{more[0]}",
        f"| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |{more[1]}",
    ]
    summary: dict[str, Any] = {}
    for one in ran:
        if not (found := kept.of(one, docs)):
            continue
        s: dict[str, Any] = {"documents": len(found)}
        for key in ("kl", "top1", "read", "index_bytes", "nbytes", "step_seconds", "times"):
            s[key] = (median if key == "times" else mean)(each[key] for each in found)
        for key in ("recall", "attention"):
            s[key] = None if found[0][key] is None else mean(each[key] for each in found)
        s["index"] = mean(each["index_bytes"] / (each["nbytes"] - each["index_bytes"]) for each in found)
        summary[one.name] = s
        cells = [
            code_cell(one.name), f"{s['documents']}", shown([each["kl"] for each in found], 4), f"{s['top1']:.3f}",
            *("-" if s[key] is None else f"{s[key]:.3f}" for key in ("recall", "attention")),
            *(f"{s[key]:.3f}" for key in ("read", "index")), f"{1e3 * s['step_seconds']:.1f}", f"{s['times']:.2f}",
        ]  # fmt: skip
        if needles is not None:
            score, count = s["needles"], s["needles_of"] = needles.get(one.name, (None, 0))
            cells.append("-" if score is None else f"{score:.0f} % of {count}")
        lines.append("| " + " | ".join(cells) + " |")
    return summary, "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", default="quest(budget=0.12);tokenselect(budget=0.12)", help="by semicolons")
    parser.add_argument("--docs", type=int, default=10)
    parser.add_argument("--context", type=int, default=6144)
    parser.add_argument("--tokens", type=int, default=48, help="fed one by one")
    parser.add_argument("--watched", type=int, default=16, help="of them, whose choices are looked at")
    parser.add_argument("--needles", type=Path, help="results of kvfold eval with the task niah")
    args = parser.parse_args()
    needles = None if args.needles is None else needles_in(args.needles, args.model)
    model, tokenizer = load(args)
    docs = long_documents(tokenizer, args.data, args.context + args.tokens, args.docs)
    about = {name: getattr(args, name) for name in ("model", "dtype", "context", "tokens", "watched", "device")}
    kept, started = RunFolder(args.out, about, "document"), time.perf_counter()
    ran = {name: Contender(name, parse(name), None) for name in [FULL, *names_in(args.methods)]}
    for number, (name, ids) in enumerate(docs, 1):
        missing = [(one.name, one.method) for one in ran.values() if kept.missing(one, [name]) and one.name != FULL]
        if not missing:
            continue
        first, *rows = measure_reading(model, missing, ids, args.context, args.watched)
        for row in (first, *rows):
            times = first.step_seconds / row.step_seconds
            kept.add(ran[row.method], [{**row.to_dict(), "document": name, "times": times}])
        told(f"{number}/{len(docs)} {name} ({time.perf_counter() - started:.0f} s)")
    names = [name for name, _ in docs]
    summary, table = report(kept, list(ran.values()), names, needles)
    write_table(args.out, summary, table)
    print(f"{args.model}, {args.dtype}, {args.context} tokens read, {args.tokens} fed one by one\n\n{table}", end="")


if __name__ == "__main__":
    main()
