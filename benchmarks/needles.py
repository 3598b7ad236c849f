"""The table of benchmarks/needles.md: how many needles each method finds at each length, in both protocols.

kvfold eval --suite needles --out benchmarks/results/needles
python benchmarks/needles.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvfold.evaluation.escaping import code_cell, in_markdown
from kvfold.evaluation.report import make_report
from kvfold.evaluation.report.cells import ALL_LENGTHS, Cell
from kvfold.evaluation.report.markdown import MEANING, budget_name
from kvfold.evaluation.report.records import ratio_note
from kvfold.files import write_whole

HERE = Path(__file__).parent
INTRO = """# Needles by length

Made by `python benchmarks/needles.py` from `benchmarks/results/needles`, which
`kvfold eval --suite needles --out benchmarks/results/needles` fills: the share of needles found, of 100, each in
running text at one of {depths} depths.
"""


def table(cells: Sequence[Cell]) -> str:
    """Methods down, lengths across."""
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    at = {(cell.contender, cell.length): cell for cell in cells}
    rows = [["method", "budget", "KV ratio", *lengths], ["---", *["---:"] * (2 + len(lengths))]]
    for one in dict.fromkeys(cell.contender for cell in cells):
        mine = [at.get((one, length)) for length in lengths]
        ratios = [cell.ratio for cell in mine if cell is not None and cell.ratio is not None]
        ratio = f"{sum(ratios) / len(ratios):.3f}" if ratios else "-"
        scores = ["-" if cell is None or cell.score is None else f"{cell.score:.0f}" for cell in mine]
        rows.append([code_cell(one.method), budget_name(one.budget), ratio, *scores])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def page(results: Path) -> str:
    """The tables of all models and protocols."""
    report = make_report([results])
    found = [cell for cell in report.cells if cell.task == "niah" and cell.length != ALL_LENGTHS]
    if not found:
        raise ValueError(f"results={str(results)!r} hold no task niah")
    parts = [INTRO.format(depths=max(cell.n for cell in found))]
    if note := ratio_note(report.results.records):
        parts.append(f"{note}\n")
    for setup in dict.fromkeys(cell.setup for cell in found):
        name = f"{in_markdown(setup.model)}, {in_markdown(setup.dtype)}"
        about = f"## {name}, protocol: {setup.protocol}\n\n{MEANING[setup.protocol]}.\n\n"
        parts.append(about + table([cell for cell in found if cell.setup == setup]) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "needles")
    parser.add_argument("--out", type=Path, default=HERE / "needles.md")
    args = parser.parse_args()
    text = page(args.results)
    write_whole(args.out, text.encode())
    print(text, end="")


if __name__ == "__main__":
    main()
