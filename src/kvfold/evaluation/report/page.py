"""The report as one HTML page that opens without a network: data, figures, script and style in one file."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvfold.evaluation.escaping import in_script
from kvfold.evaluation.report.cells import ALL_LENGTHS, ALL_TASKS, Cell
from kvfold.evaluation.report.charts import looks, specifications
from kvfold.evaluation.report.depths import Spot
from kvfold.evaluation.report.drilldown import TEXT_LIMIT, drilldown
from kvfold.evaluation.report.markdown import MEANING, budget_name
from kvfold.evaluation.report.ranking import TEST, Standing
from kvfold.evaluation.report.reading import Results
from kvfold.evaluation.report.records import ratio_note
from kvfold.evaluation.report.strata import ReportContender, Setup, Strata, budget_order
from kvfold.files import check_regular

SCRIPTS = ("filters.js", "figures.js", "examples.js", "page.js")


def check_page_path(path: Path) -> None:
    """Raise ValueError unless a page can be written there: .html, folder there, altair and vl-convert installed."""
    if path.suffix != ".html":
        raise ValueError(f"out={str(path)!r} must end in .html")
    if not path.parent.is_dir():
        raise ValueError(f"out={str(path)!r}: there is no folder {str(path.parent)!r}")
    check_regular(path, "out")
    if not can_draw():
        raise ValueError("out: needs altair and vl-convert-python; pip install 'kvfold[plot]'")


def can_draw() -> bool:
    """Whether altair and vl-convert are installed."""
    return all(find_spec(name) is not None for name in ("altair", "vl_convert"))


def vega() -> str:
    """Vega and vega-embed, for a script element of a page that opens without a network."""
    import vl_convert

    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub wants a snippet, which is optional
    return bundle.replace("</script", "<\\/script")


def _budget_key(budget: float | int | None) -> str:
    return repr(budget)


def _contender(contender: ReportContender) -> dict[str, Any]:
    return {"method": contender.method, "budget": _budget_key(contender.budget)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _cell(cell: Cell, setups: Sequence[Setup]) -> dict[str, Any]:
    plain = {name: value for name, value in vars(cell).items() if name not in ("setup", "contender")}
    numbers = {name: _rounded(plain[name]) for name in ("score", "low", "high", "ratio", "step", "prefill")}
    return {**plain, **numbers, **_contender(cell.contender), "setup": setups.index(cell.setup)}


def page_data(
    results: Results, strata: Strata, cells: Sequence[Cell], ranks: Sequence[Standing], heat: Sequence[Spot],
    limit: int = TEXT_LIMIT,
) -> dict[str, Any]:  # fmt: skip
    """All that the page's script knows."""
    setups = list(strata.samples)
    number = {id(cell): i for i, cell in enumerate(cells)}
    methods = looks(list(dict.fromkeys(contender.method for contender in strata.contenders)))
    budgets = sorted({contender.budget for contender in strata.contenders}, key=budget_order)
    singles = drilldown(results, strata, setups, limit)
    for row in singles["rows"]:
        row["budget"] = _budget_key(row["budget"])
    return {
        "setups": [asdict(setup) for setup in setups], "meaning": MEANING, "test": TEST,
        "all_tasks": ALL_TASKS, "all_lengths": ALL_LENGTHS, "lengths": strata.lengths,
        "measures": [{"label": m.label, "task": m.task, "unit": m.unit, "higher": m.higher, "macro": m.macro}
                     for m in strata.measures.values()],
        "methods": [{"name": name, "color": color, "shape": shape} for name, (color, shape) in methods.items()],
        "budgets": [{"key": _budget_key(budget), "label": "no budget" if budget is None else budget_name(budget)}
                    for budget in budgets],
        "cells": [_cell(cell, setups) for cell in cells],
        "standings": [{"cell": number[id(rank.cell)], "rank": rank.rank, "p": _rounded(rank.p),
                       "loss": _rounded(rank.loss)} for rank in ranks],
        "heat": [{"setup": setups.index(spot.setup), "task": spot.task, "length": spot.length, "depth": spot.depth,
                  **_contender(spot.contender), "score": _rounded(spot.score), "n": spot.n} for spot in heat],
        "specs": specifications(methods), "sweeps": results.sweeps, "caveat": ratio_note(results.records), **singles,
    }  # fmt: skip


def page(data: dict[str, Any]) -> str:
    """The whole HTML text."""
    here = files("kvfold.evaluation.report") / "assets"
    parts = {
        "style": (here / "page.css").read_text(encoding="utf-8"),
        "vega": vega(),
        "data": in_script(data),
        "caveat": data["caveat"],
        "script": "\n".join((here / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    text = (here / "page.html").read_text(encoding="utf-8")
    pieces = text.split("%%")  # text, name, text, name, ..., text
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))
