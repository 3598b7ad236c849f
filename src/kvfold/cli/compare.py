"""`kvfold compare`: methods side by side on one document."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvfold.cli import common

if TYPE_CHECKING:
    from kvfold.evaluation.compare import CompareRow


def compare_command(
    file: common.File,
    methods: Annotated[
        str, typer.Option("--methods", help="Slugs, separated by commas; all: every method.")
    ] = "full,kvfold,h2o,snapkv",
    budget: Annotated[str, typer.Option("--budget", help="One or several; the first is timed.")] = "0.35",
    model: common.Model = "smollm2-135m-instruct",
    ask: common.Ask = None,
    max_new_tokens: common.NewTokens = 64,
    context: common.Context = None,
    dtype: common.Dtype = None,
    device: common.Device = "cpu",
    chat: common.Chat = True,
    chart: Annotated[Path | None, typer.Option("--chart", help="Write memory against agreement (.html, .png).")] = None,
    json: common.Json = False,
) -> None:
    """Compare methods on one document: answer, memory, time, agreement with the full cache."""
    budgets = [common.number(part) for part in budget.split(",")]

    from kvfold.evaluation.chart import check_chart_path, memory_against_agreement, save_chart
    from kvfold.evaluation.compare import compare, method_names, with_budget
    from kvfold.evaluation.prompts import build_prompt
    from kvfold.models.load import load

    names = method_names(methods)
    for name in names:
        for value in budgets:
            with_budget(name, value)
    if chart is not None:
        check_chart_path(chart)
    document = common.read_document(file)
    lm, tokenizer = load(model, dtype=dtype, device=device)
    ids = build_prompt(tokenizer, document, ask, chat=chat, limit=context)["input_ids"]
    common.check_fits(lm, ids.shape[1], max_new_tokens)
    with common.stderr.status("") as status:
        rows = compare(
            lm, tokenizer, ids, names, budgets, max_new_tokens=max_new_tokens,
            tick=lambda what: status.update(f"{ids.shape[1]} tokens: {what}"),
        )  # fmt: skip
    title = f"{model}, {ids.shape[1]} tokens of {file.name}"
    if json:
        about = {
            "model": model, "prompt_tokens": ids.shape[1], "question": ask, "device": str(lm.device),
            "dtype": str(lm.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        }  # fmt: skip
        common.print_json({**about, "versions": common.versions(), "rows": [row.to_dict() for row in rows]})
    else:
        common.stdout.print(tables_of(rows, title))
    if chart is not None:
        save_chart(memory_against_agreement(rows, title), chart)
        common.stderr.print(f"chart: {chart}")


def tables_of(rows: Sequence["CompareRow"], title: str) -> Group:
    """The rows for a rich console of 80 columns: what was measured, and below it what was answered.

    Answers are text, whatever brackets they hold; what several rows answer is said once.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=12)
    for name in ("budget", "kept", "KV cache", "of full", "prefill", "tokens/s", "top-1", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    answered: dict[str, dict[str, list[str]]] = {}  # by whom, with which budgets
    for row in rows:
        seconds = "-" if row.prefill_seconds is None else f"{row.prefill_seconds:.1f} s"
        rate = "-" if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:.1f}"
        budget = "" if row.budget is None else str(row.budget)
        table.add_row(
            row.method, budget or "-", f"{row.kept_tokens:.0f}", common.size(row.nbytes), f"{row.ratio:.3f}", seconds,
            rate, f"{row.top1:.2f}", f"{row.kl:.3f}",
        )  # fmt: skip
        answered.setdefault(" ".join(row.answer.split()), {}).setdefault(row.method, []).append(budget)
    answers = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 1, 0))
    answers.add_column(overflow="fold", max_width=32)
    answers.add_column(overflow="fold")
    for answer, whose in answered.items():
        names = [" ".join([method, *budgets]).strip() for method, budgets in whose.items()]
        answers.add_row(Text("\n".join(names)), Text(answer))
    return Group(table, answers)
