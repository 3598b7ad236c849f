"""`kvfold plan`: bytes, batches and bounds on speed for a model on a device, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from kvfold.cli import common

if TYPE_CHECKING:
    from kvfold.bench import MemoryPlan, ModelShape
    from kvfold.methods import Method

METHODS = "full,kvfold,snapkv"
DTYPES = ("bfloat16", "float16", "float32")

Shape = Annotated[str, typer.Option("--model", help="Bundled name, folder, config.json, or transformers id.")]
Target = Annotated[str | None, typer.Option("--device", help="A preset, such as H100, A100-40GB, RTX4090.")]
Quantity = Annotated[str | None, typer.Option(help="In place of the preset's; all three make a device of your own.")]


def plan(
    model: Shape = "smollm2-135m-instruct",
    device: Target = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Its memory, such as 24GB.")] = None,
    bandwidth: Annotated[str | None, typer.Option("--bandwidth", help="Of its memory, such as 1TB/s.")] = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Dense matrix products, such as 165T.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", max=2**40, help="Prompt tokens (default: the model's most).")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", max=2**40, help="Rows that decode together.")] = 1,
    methods: Annotated[str, typer.Option("--methods", help="Slugs, separated by commas.")] = METHODS,
    budget: Annotated[str | None, typer.Option("--budget", help="One or several, separated by commas (0.35).")] = None,
    kv_memory: Annotated[
        str | None, typer.Option("--kv-memory", help="What a cache may hold: 512MiB, or 0.1 of dense float16.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of weights and cache: bfloat16, float16, float32.")
    ] = "bfloat16",
    weight_bits: Annotated[
        float | None, typer.Option("--weight-bits", min=0.5, max=64, help="Of quantised weights, scales included: 4.5.")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option("--prefill-chunk", min=1, help="Read the prompt in chunks.")
    ] = None,
    reserve: Annotated[float, typer.Option("--reserve", help="Share of the memory to leave alone.")] = 0.05,
    chart: Annotated[Path | None, typer.Option("--chart", help="Draw it over the context (.html, .png).")] = None,
    json: common.Json = False,
) -> None:
    """Plan a model's cache on a device: bytes, the largest batch, bounds on tokens/s and on the first token's time."""
    from kvfold.bench import find_device, make_plan, shape_of
    from kvfold.bench.limit import limited_plan

    on = find_device(device, memory=memory, bandwidth=bandwidth, flops=flops)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    on.peak(dtype)
    if kv_memory is not None and budget is not None:
        raise ValueError(f"kv_memory={kv_memory!r} sets the budget; budget={budget!r} is given, too")
    budgets = [common.number(part) for part in (budget or "0.35").split(",")]
    most = None if kv_memory is None else common.memory(kv_memory)
    if most is not None and methods == METHODS:
        methods = "kvfold"  # of the others one has no budget, and one keeps to none while it generates

    from kvfold.evaluation.chart import check_chart_path, save_chart
    from kvfold.evaluation.compare import budget_of, split_names, with_budget
    from kvfold.methods import parse
    from kvfold.models.sizes import check_sizes

    names = [name for name in split_names(methods) if most is None or name != "full"]  # which is there anyway
    wanted = {"full": parse("full")}
    for name in names:
        for value in budgets:
            made = parse(name) if most is not None else with_budget(name, value)
            own = budget_of(made) if most is None else None
            wanted.setdefault(name if own is None else f"{name} {own}", made)
    if chart is not None:
        check_chart_path(chart)

    with common.stderr.status(f"reading the shape of {model}"):
        config = read_config(model)
        check_sizes(model, config)
        try:
            hollow = without_weights(config, dtype)
            shape = replace(shape_of(hollow), weight_bits=weight_bits)
        except ValueError:
            raise
        except Exception as error:  # of a model's code, made from numbers that it was not written for
            raise ValueError(f"model={model!r} has a configuration that makes no model: {said(error)}") from error
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and type(limit) is not int:
        raise ValueError(f"model={model!r}: max_position_embeddings={limit!r} must be a positive integer")
    tokens = context if context is not None else limit or 8192
    if limit is not None and tokens > limit:
        raise ValueError(f"context={tokens} must be at most {limit}, what {model} is made for")

    def plans(tokens: int, by_name: bool = False) -> list["MemoryPlan"]:
        found = list["MemoryPlan"]()
        for name, made in wanted.items():
            if most is not None and name in names:
                try:
                    made = limited_plan(shape, hollow, made, most, dtype=dtype, context=tokens, batch=batch)
                except ValueError:
                    if by_name and tokens < asked:  # a share of a short text may be too little for anything
                        continue
                    raise
                name = name if by_name else briefly(made)
            found.append(
                make_plan(
                    shape, on, made, dtype=dtype, context=tokens, batch=batch, reserve=reserve, name=name,
                    chunk=prefill_chunk,
                )
            )  # fmt: skip
        return found

    asked = tokens
    rows = plans(tokens)
    title = f"{model}, {tokens:,} tokens, batch {batch}, {dtype}, on {on.name}"
    if json:
        about = {
            "model": model, "parameters": shape.parameters, "active_parameters": shape.active_parameters,
            "active_parameters_estimated": shape.experts > 0, "device": on.to_dict(), "dtype": dtype,
            "context": tokens, "batch": batch, "reserve": reserve, "weight_bits": weight_bits,
            "prefill_chunk": prefill_chunk,
        }  # fmt: skip
        common.print_json({**about, "versions": common.versions(), "rows": [row.to_dict() for row in rows]})
    else:
        common.show(table_of(rows, title))
        common.show(caption_of(shape, rows[0], on.memory))
        untried = [("--prefill-chunk 512", prefill_chunk), ("--weight-bits 4.5", weight_bits)]
        if most is not None:
            print(limit_sentence(rows[1:], kv_memory or "", most, on.memory))
        print(verdict(rows, on.memory, [flag for flag, given in untried if given is None]))
    if chart is not None:
        curve = [row for each in contexts_up_to(tokens) for row in plans(each, by_name=True)]
        save_chart(chart_of(curve, on.memory, f"{model}, {dtype}, on {on.name}"), chart)
        common.stderr.print(f"chart: {chart}")


def read_config(name: str) -> Any:
    """The transformers configuration of a bundled model, a folder, a JSON file or a hub id; no weights are loaded.

    Raises ValueError for a name that leads nowhere or a file that is no configuration, OSError for a hub id that
    can't be fetched.
    """
    from transformers import AutoConfig

    from kvfold.models.bundled import Bundled
    from kvfold.models.load import check_hub, convert_bundled, find, unknown

    path = Path(name).expanduser()
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"model={name!r} is not a file")
        place: Any = path
    else:
        place = find(name)
        if isinstance(place, Bundled):
            place = convert_bundled(place, True)
        elif isinstance(place, Path) and place.is_file():
            raise ValueError(
                f"model={name!r} is a GGUF file: plan takes a config; `kvfold run` converts it to a folder"
            )
        elif isinstance(place, str):
            check_hub(place)
    try:
        return AutoConfig.from_pretrained(place)
    except Exception as error:  # transformers' own, huggingface_hub's checks of fields, whatever a config's code raises
        if isinstance(place, Path):
            why = said(error)
            raise ValueError(f"model={name!r} holds no configuration that transformers can read: {why}") from None
        raise OSError(f"{unknown(name)}; as a hub id it fails: {said(error)}") from error


def said(error: Exception) -> str:
    """An error on one line, its kind before it where it says little by itself."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def without_weights(config: Any, dtype: str) -> Any:
    """The model of a configuration on the meta device: shapes and no numbers. Raises ValueError if it is no decoder."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except ValueError as error:
        raise ValueError(f"model of type {config.model_type!r} is no causal language model: {error}") from None


def contexts_up_to(most: int) -> list[int]:
    """Powers of two from 1,024 on (from 16 on for short contexts), and `most` itself."""
    powers, least = [], 1024 if most > 2048 else 16
    while least < most:
        powers.append(least)
        least *= 2
    return [*powers, most]


def amount(nbytes: float | int) -> str:
    """Bytes in GB or MB, powers of ten as on datasheets."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"


def caption_of(shape: "ModelShape", row: "MemoryPlan", memory: int) -> str:
    """What all rows share."""
    active = f" (about {shape.active_parameters / 1e9:,.2f} billion for one token)" if shape.experts else ""
    return (
        f"{shape.parameters / 1e9:,.3f} billion parameters{active}: {amount(row.weight_bytes)}; reserve "
        f"{amount(row.reserve_bytes)}; memory {amount(memory)}; a dense cache takes {amount(row.dense_kv_bytes)}. "
        "Rates and times are bounds from datasheet figures, not measurements."
    )


def table_of(rows: Sequence["MemoryPlan"], title: str) -> Table:
    """The rows for a rich console of 80 columns. What does not fit has no speed."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    units = [max(getattr(row, name) for row in rows) >= 1e9 for name in ("kv_bytes", "total_bytes")]
    cache, in_all = ((1e9, "GB") if large else (1e6, "MB") for large in units)
    for name in (
        "kept\n/head", f"cache\n{cache[1]}", "of\ndense", f"in all\n{in_all[1]}", "tokens\n/s", "gain",
        "most\nrows", "tokens\n/s then", "first\ntoken",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        speed = (
            [rounded(row.tokens_per_second), f"{row.gain:.2f}", f"{row.largest_batch:,}",
             rounded(row.largest_tokens_per_second), duration(row.prefill_seconds)]
            if row.fits else ["too", "much", f"{row.largest_batch:,}" if row.largest_batch else "none"]
        )  # fmt: skip
        table.add_row(
            row.method, f"{row.kept_tokens:,.0f}", f"{row.kv_bytes / cache[0]:,.2f}",
            f"{row.kv_bytes / row.dense_kv_bytes:.3f}", f"{row.total_bytes / in_all[0]:,.2f}", *speed,
        )  # fmt: skip
    return table


def rounded(rate: float) -> str:
    """A rate with a digit behind the point where it is small."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.1f}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"


def verdict(rows: Sequence["MemoryPlan"], memory: int, untried: Sequence[str]) -> str:
    """One sentence: what fits, and which of it answers most; or what is in the way. `untried`: flags that may help."""
    fitting, over = [row for row in rows if row.fits], [row.method for row in rows if not row.fits]
    also = f"; {' and '.join(untried)} may help" if over and untried else ""
    if not fitting:
        least = min(rows, key=lambda row: row.total_bytes)
        return (
            f"Nothing fits in {amount(memory)}: {least.method} takes {amount(least.total_bytes)}, of which weights "
            f"are {amount(least.weight_bytes)} and the reserve {amount(least.reserve_bytes)}{also}."
        )
    best = max(fitting, key=lambda row: row.largest_tokens_per_second)
    most = "1 row" if best.largest_batch == 1 else f"{best.largest_batch:,} rows at once"
    others = (
        f"All of them fit in {amount(memory)}" if not over else f"All but {', '.join(over)} fit in {amount(memory)}"
    )
    speed = f"{best.method} answers most, {most}, at most {rounded(best.largest_tokens_per_second)} tokens/s together"
    return f"{others}, and {speed}{also}."


def briefly(method: "Method") -> str:
    """A method's text with the options alone that are not what they are by themselves."""
    from kvfold.methods.base import stages_of

    parts = list[str]()
    for stage in stages_of(method):
        given = {
            name: getattr(stage, name) for name, usual in stage.info.options.items() if getattr(stage, name) != usual
        }
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        parts.append(f"{stage.info.slug}({said})" if said else stage.info.slug)
    return " | ".join(parts)


def limit_sentence(rows: Sequence["MemoryPlan"], said: str, limit: int | float, memory: int) -> str:
    """What a limit comes to, a sentence for each method, and whether the whole of it fits."""
    found = list[str]()
    for row in rows:
        most = round(limit * row.dense_kv_bytes) if isinstance(limit, float) else limit
        total = row.weight_bytes + row.reserve_bytes + most
        found.append(
            f"Under a limit of {said} {row.method} keeps {row.kept_tokens:,.0f} tokens a KV head of {row.context:,}, "
            f"and {row.budget:,} at most while it generates; the limit with weights and reserve, {amount(total)}, "
            f"{'fits' if total <= memory else 'does not fit'} in {amount(memory)}."
        )
    return "\n".join(found)


def lines_of(rows: Sequence["MemoryPlan"]) -> dict[str, str]:
    """The line that each method is drawn on: those whose caches are within 10 % of each other's share one."""
    sizes: dict[str, dict[int, int]] = {}
    for row in rows:
        sizes.setdefault(row.method, {})[row.context] = row.kv_bytes
    groups: list[list[str]] = []
    for name, own in sizes.items():
        near = (g for g in groups if all(abs(n / sizes[g[0]][at] - 1) <= 0.1 for at, n in own.items()))
        group = next(near, None)
        groups.append([name]) if group is None else group.append(name)
    return {name: ", ".join(group) for group in groups for name in group}


def chart_of(rows: Sequence["MemoryPlan"], memory: int, title: str) -> Any:
    """An altair chart over the context: memory with the device's limit, decode rate, largest batch; a line a method."""
    import altair as alt

    lines, batch = lines_of(rows), rows[0].batch
    points = [
        {
            "method": lines[row.method], "context": row.context, "fits": row.fits, "memory": row.total_bytes / 1e9,
            "rate": row.tokens_per_second, "largest": row.largest_batch or None,
            "most": row.largest_tokens_per_second or None, "kv": amount(row.kv_bytes),
        }
        for row in rows
        if lines[row.method].split(", ")[0] == row.method
    ]  # fmt: skip
    ticks = sorted({row.context for row in rows})
    x = alt.X(
        "context:Q",
        scale=alt.Scale(type="log", base=2, domain=[ticks[0], ticks[-1]], nice=False, padding=8),
        axis=alt.Axis(
            values=ticks, labelExpr="datum.value >= 1024 ? format(datum.value / 1024, '.3~r') + 'k' : datum.value"
        ),
        title="context (tokens)",
    )
    order = list(dict.fromkeys(lines.values()))
    legend = alt.Legend(title=None, orient="top", columns=1, labelLimit=700, symbolType="stroke", symbolStrokeWidth=4)
    color = alt.Color("method:N", sort=order, scale=alt.Scale(domain=order), legend=legend)

    def panel(field: str, caption: str, kind: str = "linear") -> Any:
        ticking = alt.Axis(format="~s", tickCount=4 if kind == "log" else 6)
        base = alt.Chart(alt.Data(values=points)).encode(
            x=x, y=alt.Y(f"{field}:Q", title=None, scale=alt.Scale(type=kind), axis=ticking), color=color,
            tooltip=["method:N", alt.Tooltip("context:Q", format=","), "kv:N", "largest:Q", "fits:N"]
            + [alt.Tooltip(f"{each}:Q", format=",.1f") for each in ("memory", "rate", "most")],
        )  # fmt: skip
        marks = base.mark_point(size=35, filled=True, opacity=1)
        if field in ("memory", "rate"):
            marks = marks.transform_filter("datum.fits")
        layers = [base.mark_line(), marks]
        if field == "memory":
            limit = alt.Chart(alt.Data(values=[{"limit": memory / 1e9, "text": f"the device has {amount(memory)}"}]))
            layers.append(limit.mark_rule(strokeDash=[6, 4]).encode(y="limit:Q"))
            layers.append(limit.mark_text(align="left", dx=4, dy=9).encode(y="limit:Q", x=alt.value(0), text="text:N"))
        return alt.layer(*layers).properties(width=360, height=220, title=caption)

    above = alt.hconcat(
        panel("memory", f"Memory at batch {batch} (GB)"), panel("rate", f"Decode tokens/s at batch {batch}, at most")
    )
    below = alt.hconcat(
        panel(
            "largest", "Largest batch that fits" + ("" if any(row.largest_batch for row in rows) else ": none"), "log"
        ),
        panel("most", "Decode tokens/s at that batch, at most", "log"),
    )
    under = [
        "Bounds from datasheet figures. A line goes on without points where the batch does not fit.",
        "Methods within 10 % share a line.",
    ]
    return alt.vconcat(above, below).properties(title=alt.TitleParams(title, subtitle=under))
