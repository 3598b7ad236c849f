"""`kvfold eval`: what compression costs, on tasks: accuracy and agreement for methods at budgets."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvfold.cli import common

if TYPE_CHECKING:
    from kvfold.evaluation.runner import Progress as Done
    from kvfold.evaluation.sweep import Sweep

Names = Annotated[str | None, typer.Option(help="Several, separated by commas; instead of the sweep's.")]


def eval_command(
    sweep: Annotated[Path | None, typer.Argument(help="A sweep: .yaml, .toml or .json (docs/evaluation.md).")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="A sweep that ships; smoke takes minutes.")] = None,
    models: Annotated[str | None, typer.Option("--models", help="Bundled names, ids, folders.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Slugs or compositions.")] = None,
    budgets: Annotated[str | None, typer.Option("--budgets", help="Fractions, or tokens per KV head.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Task names, with options: niah(keys=4).")] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", help="Tokens of prompt and answer.")] = None,
    protocols: Annotated[str | None, typer.Option("--protocols", help="aware, agnostic, turns.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Examples of each task.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Examples read together.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the tasks that are made here.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    compress: Annotated[str | None, typer.Option("--compress", help="both, or prefill alone.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Chat template, where there is one.")] = None,
    texts: Annotated[Path | None, typer.Option("--texts", help="Running text for haystacks, a file or folder.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="A benchmark's published files.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of results; a killed sweep goes on.")] = None,
    device: common.Device = "cpu",
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster, or local.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List tasks and suites, and end.")] = False,
    json: common.Json = False,
) -> None:
    """Measure methods at budgets on tasks; results go to a folder that `kvfold report` reads.

    Ends with 1 where something failed, now or in an earlier run, or could not be tried.
    """
    if list_all:
        _list(json)
        return
    given = {
        "models": _words(models), "methods": _words(methods), "tasks": _words(tasks), "protocols": _words(protocols),
        "budgets": None if budgets is None else [common.number(part) for part in _words(budgets) or []],
        "lengths": None if lengths is None else [_whole(part) for part in _words(lengths) or []],
        "samples": samples, "batch": batch, "seed": seed, "dtype": dtype, "compress": compress, "chat": chat,
        "texts": texts, "data": data,
    }  # fmt: skip
    made = _sweep(sweep, suite, {name: value for name, value in given.items() if value is not None})
    folder = out or Path("results") / made.name
    done = run_with_progress(made, folder, device, ray, retry_failed)
    _show(folder, made, done, json)
    common.end(done.complete)


def _words(text: str | None) -> list[str] | None:
    from kvfold.evaluation.compare import split_names

    return None if text is None else split_names(text)


def _whole(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"lengths={text!r} must be whole numbers of tokens")
    return int(text)


def _sweep(path: Path | None, suite: str | None, given: dict[str, Any]) -> "Sweep":
    from kvfold.evaluation import sweep as sweeps

    if path is not None and suite is not None:
        raise ValueError(f"sweep={str(path)!r} and suite={suite!r}: name one of them")
    if path is not None:
        found = {"name": path.stem} | sweeps.read_definition(path)
    elif suite is not None:
        found = sweeps.suite(suite)
    elif "tasks" in given:
        found = {"models": ["smollm2-135m-instruct"], "methods": ["kvfold", "h2o", "snapkv"], "budgets": [0.5, 0.25]}
        found["lengths"] = [1024]
    else:
        raise ValueError("name a sweep file, --suite, or --tasks; --list shows what there is")
    return sweeps.check_sweep(found | given, str(path or suite or "sweep"))


def run_with_progress(sweep: "Sweep", folder: Path, device: str, ray: str | None, retry_failed: bool = False) -> "Done":
    from kvfold.evaluation.on_ray import run_on_ray
    from kvfold.evaluation.runner import run_sweep

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=common.stderr) as bar:
        job = bar.add_task("loading", total=None)
        start: int | None = None

        def tick(done: "Done") -> None:
            nonlocal start
            start = done.done if start is None else start  # what an earlier run did says nothing about time left
            failed = f" ({done.failed} failed)" if done.failed else ""
            bar.update(job, description=done.now + failed, completed=done.done - start, total=done.total - start)

        try:
            if ray is not None:
                return run_on_ray(sweep, folder, ray, device=device, retry_failed=retry_failed, tick=tick)
            return run_sweep(sweep, folder, device=device, retry_failed=retry_failed, tick=tick)
        except KeyboardInterrupt:
            common.stderr.print(f"stopped; the same command goes on with what is in {folder}", soft_wrap=True)
            raise


def _show(folder: Path, sweep: "Sweep", done: "Done", json: bool) -> None:
    from kvfold.evaluation.report import make_report
    from kvfold.evaluation.report.cells import ALL_LENGTHS
    from kvfold.evaluation.report.page import can_draw

    cells = [cell for cell in make_report([folder]).cells if cell.length == ALL_LENGTHS]
    if json:
        rows = [cell.to_dict() for cell in cells]
        counts = {"records": done.total, "failed": done.failed, "failures": done.failures, "problems": done.problems}
        common.print_json({"folder": str(folder), **counts, "rows": rows})
        _say(done)
        return
    for setup in dict.fromkeys(cell.setup for cell in cells):
        mine = [cell for cell in cells if cell.setup == setup]
        tasks, at = list(dict.fromkeys(cell.task for cell in mine)), {(c.task, c.contender): c for c in mine}
        table = Table(title=f"{setup.model}, protocol {setup.protocol}")
        for name in ("method", "budget", "KV", *tasks):
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name == "method")
        for one in dict.fromkeys(cell.contender for cell in mine):
            found = [at.get((task, one)) for task in tasks]
            ratio = next((cell.ratio for cell in found if cell is not None and cell.ratio is not None), None)
            shown = ["-" if cell is None else _number(cell.score, cell.higher) for cell in found]
            budget = "-" if one.budget is None else str(one.budget)
            table.add_row(one.method, budget, "-" if ratio is None else f"{ratio:.3f}", *shown)
        common.show(table)
    _say(done)
    failed = f", {done.failures} of them failures ({done.failed} new)" if done.failures else ""
    command = f"kvfold report {shlex.quote(str(folder))} --out page.html"
    # Lines of their own, which no console wraps: commands are there to be pasted.
    common.stderr.print(f"{done.done} results in {folder}{failed}. A page of them:\n{command}", soft_wrap=True)
    if not can_draw():
        common.stderr.print("It draws with altair: pip install 'kvfold[plot]'", markup=False)


def _say(done: "Done") -> None:
    """On stderr, why the command ends with 1."""
    for problem in done.problems:
        common.stderr.print(f"not tried: {problem}", markup=False, highlight=False, soft_wrap=True)
    if done.failures:
        common.stderr.print("failures are in results.jsonl, each with its error; --retry-failed tries them again")


def _number(score: float | None, higher: bool) -> str:
    return "failed" if score is None else f"{score:.1f}" if higher else f"{score:.3f}"


def _list(json: bool) -> None:
    from kvfold.evaluation.sweep import list_suites
    from kvfold.evaluation.tasks import list_tasks

    tasks = list_tasks()
    if json:
        about = [
            {"name": t.name, "title": t.title, "paper": t.paper, "sized": t.sized, "options": t.options} for t in tasks
        ]
        common.print_json({"suites": list_suites(), "tasks": about})
        return
    table = Table(title="tasks")
    for name in ("task", "what", "arXiv", "options"):
        table.add_column(name, overflow="fold")
    for each in tasks:
        table.add_row(each.name, each.title, each.paper, ", ".join(f"{k}={v!r}" for k, v in each.options.items()))
    common.show(table)
    print(f"suites: {', '.join(list_suites())}")
