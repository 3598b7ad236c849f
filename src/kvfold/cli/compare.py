"""`kvfold compare`: methods side by side on one document."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
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
    fast_linears: common.FastLinears = False,
    chart: Annotated[
        Path | None, typer.Option("--chart", help="Write a page (.html) or its charts alone (.png).")
    ] = None,
    json: common.Json = False,
) -> None:
    """Compare methods on one document: answer, memory, time, agreement with the full cache.

    A method that fails is left out, and said; the command then ends with 1.
    """
    budgets = [common.number(part) for part in budget.split(",")]

    import torch

    from kvfold.artefacts.probed import probe_note, probe_seconds
    from kvfold.bench.machine import Elsewhere
    from kvfold.evaluation.chart import check_chart_path, memory_against_agreement, save_chart
    from kvfold.evaluation.compare import compare, method_names, with_budget
    from kvfold.evaluation.comparison import answers_of, comparison_page
    from kvfold.files import write_whole
    from kvfold.methods.registry import broken_plugins
    from kvfold.models.load import load

    names = method_names(methods)
    for name in names:
        for value in budgets:
            with_budget(name, value)
    if chart is not None:
        check_chart_path(chart)
    document = common.read_document(file)
    lm, tokenizer = load(model, dtype=dtype, device=device)
    ids, cut = common.read_prompt(
        lm, tokenizer, document, ask, chat=chat, context=context, new=max_new_tokens
    )  # fmt: skip
    others, begun = Elsewhere(), 0.0
    timed = sum(name != "full" for name in names)

    def say(row: "CompareRow") -> None:
        ((answer, (who,)),) = answers_of([row]).items()
        common.stderr.print(f"{who}: {answer}", markup=False, highlight=False)
        if row.method == "full" and timed:
            took = time.perf_counter() - begun
            left = took * timed + (took + took * timed / 4) * (len(budgets) > 1)
            common.stderr.print(f"(that took {took:.0f} s; all methods about {left:.0f} s more)", highlight=False)

    skipped: list[dict[str, str]] = []

    def left_out(name: str, value: Any, error: Exception) -> None:
        who = name if value is None else f"{name} {value}"
        skipped.append({"contender": who, "reason": " ".join(f"{type(error).__name__}: {error}".split())})
        common.say_left_out(skipped[-1:])

    with common.with_fast_linears(lm, fast_linears), common.stderr.status("") as status:
        now = ""

        def tick(what: str) -> None:
            nonlocal begun, now
            now = f"{ids.shape[1]:,} tokens: {what}"
            status.update(now)
            begun = time.perf_counter() if what == "full" else begun  # when the warm-up is over

        rows = compare(
            lm, tokenizer, ids, names, budgets, max_new_tokens=max_new_tokens, tick=tick, made_row=say, failed=left_out,
            progress=lambda share: status.update(f"{now}, {share:.0%} read"),
        )  # fmt: skip
    busy = others.cores()
    title = f"{model}, {ids.shape[1]:,} tokens of {file.name}{', fast linears' if fast_linears else ''}"
    if json:
        about = {
            "model": model, "prompt_tokens": ids.shape[1], "cut_tokens": cut, "question": ask, "device": str(lm.device),
            "dtype": str(lm.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "fast_linears": fast_linears, "probe_seconds": probe_seconds(lm),
        }  # fmt: skip
        common.print_json({**about, "versions": common.versions(), "rows": [row.to_dict() for row in rows],
                           "skipped": skipped})  # fmt: skip
    else:
        for table in tables_of(rows, title):
            common.show(table)
        if note := probe_note(probe_seconds(lm)):
            print(note)
    common.say_busy(busy)
    if chart is not None:
        if chart.suffix == ".html":
            write_whole(chart, comparison_page(rows, title, ask).encode(), "chart")
        else:
            save_chart(memory_against_agreement(rows, title), chart)
        common.stderr.print(f"chart: {chart}")
    common.end(not skipped and not (methods.strip() == "all" and broken_plugins()))


def tables_of(rows: Sequence["CompareRow"], title: str) -> tuple[Table, Table]:
    """The rows for a rich console of 80 columns: what was measured, and below it what was answered.

    Answers are text, whatever brackets they hold; what several rows answer is said once.
    """
    from kvfold.evaluation.comparison import answers_of

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=12)
    for name in ("budget", "kept", "KV cache", "of full", "prefill", "tokens/s", "top-1", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        seconds = "-" if row.prefill_seconds is None else f"{row.prefill_seconds:.1f} s"
        rate = "-" if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:.1f}"
        budget = "" if row.budget is None else str(row.budget)
        table.add_row(
            row.method, budget or "-", f"{row.kept_tokens:.0f}", common.size(row.nbytes), f"{row.ratio:.3f}", seconds,
            rate, f"{row.top1:.2f}", f"{row.kl:.3f}",
        )  # fmt: skip
    answers = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 1, 0))
    answers.add_column(overflow="fold", max_width=32)
    answers.add_column(overflow="fold")
    for answer, whose in answers_of(rows).items():
        answers.add_row(Text(", ".join(whose)), Text(answer or "(nothing)"))
    return table, answers
