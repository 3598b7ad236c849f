"""`kvfold bench reading`: what methods that read few tokens read, and how much of what matters."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import common
from kvfold.cli.bench import (
    Kind,
    Methods,
    Out,
    finish,
    hardware,
    known_dtype,
    linears_of,
    measured,
    methods_of,
    prepared,
)


def reading_command(
    model: common.Model = "smollm2-135m-instruct",
    methods: Methods = "quest,tokenselect",
    budget: Annotated[str, typer.Option("--budget", help="What a step reads: a share, or tokens.")] = "0.12",
    file: Annotated[Path | None, typer.Option("--file", help="A text; else stories come with kvfold.")] = None,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens that are read at once.")] = 6144,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens that are fed one by one.")] = 48,
    watched: Annotated[int, typer.Option("--watched", min=1, help="Of those, whose choices are looked at.")] = 16,
    dtype: Kind = "float32",
    device: common.Device = "cpu",
    fast_linears: common.FastLinears = False,
    json: common.Json = False,
    out: Out = None,
) -> None:
    """What methods that read few tokens read at a step, how much of the true attention that has, and what it costs."""
    wanted, kind = methods_of(methods, budget), known_dtype(dtype)

    from kvfold.bench import tables
    from kvfold.bench.reading import measure_reading
    from kvfold.evaluation.tasks.texts import bundled_text
    from kvfold.models.load import load

    on, text = prepared(device, out, None), bundled_text() if file is None else common.read_document(file)
    lm, tokenizer = load(model, dtype=kind, device=on)
    common.check_fits(lm, context, tokens)
    ids = tokenizer(text[: 12 * (context + tokens)], return_tensors="pt").input_ids[0, : context + tokens]
    if len(ids) < context + tokens:
        raise ValueError(f"context={context} and tokens={tokens} must be at most the text's {len(ids)} tokens together")
    with measured("reading", on) as (tick, result), common.with_fast_linears(lm, fast_linears):
        rows = measure_reading(lm, wanted, ids, context, watched, tick)
        result |= {
            "model": model, "dtype": kind, "context": context, "tokens": tokens, "watched": watched,
            "fast_linears": fast_linears, "rows": [row.to_dict() for row in rows],
        }  # fmt: skip
    title = f"{model}, {context:,} tokens, {kind}{linears_of(fast_linears)}, on {hardware(result)}"
    finish(result, [tables.reading_table(rows, title)], json, out, None, lambda: None)
