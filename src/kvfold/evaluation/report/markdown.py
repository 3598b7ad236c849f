"""The report as Markdown: a table for each model and protocol."""

from collections.abc import Sequence
from statistics import fmean

from kvfold.evaluation.escaping import in_markdown
from kvfold.evaluation.report.cells import ALL_LENGTHS, ALL_TASKS, Cell
from kvfold.evaluation.report.records import ResultRecord, ratio_note
from kvfold.evaluation.report.strata import ReportContender, Setup

MEANING = {
    "aware": "question-aware: the question is in the prompt when the cache is compressed",
    "agnostic": "question-agnostic: the context is compressed before any question is known",
    "turns": "turns: questions follow one another in a dialogue over one compressed cache",
}


def budget_name(budget: float | int | None) -> str:
    """A budget for readers: a share of the prompt, or tokens per KV head."""
    if budget is None:
        return "-"
    return f"{100 * budget:.4g} %" if isinstance(budget, float) else f"{budget} tokens"


def _number(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.score is None:
        return "failed"
    digits = 1 if cell.higher else 3
    text = f"{cell.score:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    return text + (" †" if cell.partial else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def _section(setup: Setup, cells: Sequence[Cell], records: Sequence[ResultRecord]) -> str:
    at = {(cell.task, cell.length, cell.contender): cell for cell in cells}
    units = {cell.task: cell.unit for cell in cells}
    lengths = [length for length in dict.fromkeys(cell.length for cell in cells) if length != ALL_LENGTHS]
    contenders = list(dict.fromkeys(cell.contender for cell in cells))
    names = {one: [in_markdown(one.method), budget_name(one.budget)] for one in contenders}
    head = [
        in_markdown(task) + ("" if unit in ("score", "top-1") else f" ({unit}, lower is better)")
        for task, unit in units.items()
    ]  # fmt: skip
    rows = []
    for one in contenders:
        own = [record for record in records if ReportContender(record.method, record.budget) == one]
        good = [record for record in own if record.error is None]
        ratio = f"{fmean(record.nbytes / record.full_nbytes for record in good):.3f}" if good else ""
        numbers = [_number(at.get((task, ALL_LENGTHS, one))) for task in units]
        rows.append([*names[one], *numbers, ratio, str(len(good)), str(len(own) - len(good))])
    about = f"Protocol {setup.protocol} ({MEANING[setup.protocol]}). Scores of 0 to 100 with 95 % bootstrap intervals"
    about += " over examples"
    if ALL_TASKS in units:
        tasks = sum(unit == "score" for unit in units.values()) - 1
        about += f"; the average is over {tasks} task{'s' * (tasks != 1)}, each weighing alike"
    about += f"; lengths averaged: {', '.join(lengths)}." if len(lengths) > 1 else f"; length: {lengths[0]}."
    parts = [
        f"## {in_markdown(setup.model)}, {in_markdown(setup.dtype)}, protocol: {setup.protocol}", about,
        _table(["method", "budget", *head, "KV ratio", "n", "failed"], rows),
    ]  # fmt: skip
    if len(lengths) > 1 and ALL_TASKS in units:
        by_length = [
            [*names[one], *(_number(at.get((ALL_TASKS, name, one))) for name in lengths)] for one in contenders
        ]
        parts += [
            f"By length, protocol {setup.protocol}: {ALL_TASKS}.", _table(["method", "budget", *lengths], by_length)
        ]  # fmt: skip
    if any(cell.partial for cell in cells):
        parts.append("† over fewer examples than others had: some failed or were not run.")
    return "\n\n".join(parts)


def markdown_report(cells: Sequence[Cell], records: Sequence[ResultRecord]) -> str:
    """Tables of all setups, the protocol named above each; first what is to be said of their ratios, if anything."""
    sections = [
        _section(
            setup, [cell for cell in cells if cell.setup == setup],
            [record for record in records if Setup(record.model, record.dtype, record.protocol) == setup],
        )
        for setup in dict.fromkeys(cell.setup for cell in cells)
    ]  # fmt: skip
    return "\n\n".join(["# Evaluation", *filter(None, [ratio_note(records)]), *sections]) + "\n"
