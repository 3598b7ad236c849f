"""`kvfold bench`: decode attention, a model end to end, how cost grows with the text, and what few tokens are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvfold.cli import common

if TYPE_CHECKING:
    from kvfold.bench import endtoend

FORMAT = 1
"""Of the JSON that a benchmark writes."""
app = typer.Typer(no_args_is_help=True, help="Measure speed and memory, each number beside its bound.")

Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Turns of every contender, one after the other.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the JSON there.")]
Chart = Annotated[Path | None, typer.Option("--chart", help="Draw the result (.html, .png).")]
Methods = Annotated[str, typer.Option("--methods", help="Slugs, separated by commas.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Tokens that each cache decodes in a round.")]
Quantized = Annotated[bool, typer.Option("--quantized/--no-quantized", help="Also transformers' QuantizedCache.")]
Beside = Annotated[int, typer.Option("--beside", min=0, help="Each round once more, beside so many busy programs.")]
Kind = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]


@app.command("kernels")
def kernels_command(
    context: Annotated[str, typer.Option("--context", help="Stored tokens, one or several.")] = "1024,8192",
    batch: Annotated[str, typer.Option("--batch", help="Rows, one or several.")] = "1,8",
    kv_heads: Annotated[int, typer.Option("--kv-heads", min=1, help="KV heads of a layer.")] = 3,
    group: Annotated[int, typer.Option("--group", min=1, help="Query heads for each KV head.")] = 3,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1, help="Numbers of a key, and of a value.")] = 64,
    dtype: Annotated[str, typer.Option("--dtype", help="One or several.")] = "float32,bfloat16",
    formats: Annotated[str, typer.Option("--formats", help="Also these: 'kivi(bits=4),kivi(bits=2),fp8'.")] = "",
    ragged: Annotated[bool, typer.Option("--ragged", help="Also heads that keep 10 % to 100 % of the tokens.")] = False,
    scattered: Annotated[bool, typer.Option("--scattered/--no-scattered", help="Also pages in any order.")] = True,
    device: common.Device = "cpu",
    rounds: Rounds = 15,
    beside: Beside = 0,
    json: common.Json = False,
    out: Out = None,
    chart: Chart = None,
) -> None:
    """Decode attention over pages beside torch's SDPA, and both beside plain reads of memory."""
    contexts, batches = integers("context", context), integers("batch", batch)
    dtypes = [known_dtype(part.strip()) for part in dtype.split(",")]
    stored = formats_of(formats)

    from kvfold.bench import chart as charts
    from kvfold.bench import tables
    from kvfold.bench.beside import busy
    from kvfold.bench.kernels import KINDS, Case, measure_kernels

    on = prepared(device, out, chart)
    cases = [Case(t, b, kv_heads, group, head_dim, d) for d in dtypes for t in contexts for b in batches]
    with measured("kernels", on, beside) as (tick, result), busy(beside) as loops:
        kinds = [kind for kind, wanted in zip(KINDS, (True, scattered, ragged), strict=True) if wanted]
        rows, rate, cores = measure_kernels(
            cases, kinds=kinds, formats=stored, device=on, rounds=rounds, loops=loops, tick=tick
        )
        result |= {
            "rounds": rounds, "read_bandwidth": rate.to_dict(),
            "arithmetic": [each.to_dict() for each in cores.found()], "rows": [row.to_dict() for row in rows],
        }  # fmt: skip
    bandwidth = rate.bytes_per_second
    title = f"Decode attention, {kv_heads} KV heads x {group}, {head_dim} numbers, on {hardware(result)}"
    finish(
        result, [tables.kernels_table(rows, bandwidth, title, cores.found())], json, out, chart,
        lambda: charts.kernels_chart(rows, bandwidth, title),
    )  # fmt: skip


@app.command("run")
def run_command(
    model: common.Model = "smollm2-135m-instruct",
    methods: Methods = "full,kvfold,snapkv",
    budget: Annotated[str, typer.Option("--budget", help="Fraction of the prompt, or tokens per KV head.")] = "0.2",
    context: Annotated[int, typer.Option("--context", min=2, help="Prompt tokens, random ones.")] = 6000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows that decode together.")] = 8,
    prefill_batch: Annotated[int, typer.Option("--prefill-batch", min=0, help="Of the timed prefills; 0: none.")] = 1,
    steps: Steps = 12,
    rounds: Rounds = 2,
    dtype: Kind = "float32",
    device: common.Device = "cpu",
    fast_linears: common.FastLinears = False,
    beside: Beside = 0,
    quantized: Quantized = True,
    peak: Annotated[bool, typer.Option("--peak", help="Also each cache's peak, in a process of its own.")] = False,
    peer_python: Annotated[list[str], typer.Option("--peer-python", help="A Python that has kvpress or vLLM.")] = [],  # noqa: B006
    json: common.Json = False,
    out: Out = None,
    chart: Chart = None,
) -> None:
    """Decode and prefill a model with each method, beside transformers' caches and beside their bounds."""
    wanted, kind = methods_of(methods, budget), known_dtype(dtype)

    from kvfold.artefacts.probed import probe_seconds
    from kvfold.bench import chart as charts
    from kvfold.bench import contenders as c
    from kvfold.bench import peers, tables
    from kvfold.bench.beside import busy
    from kvfold.bench.endtoend import PROFILED, WARM_STEPS, measure_run
    from kvfold.models.load import load

    on = prepared(device, out, chart)
    folder = peer_folder(model) if peer_python else None
    if peer_python and prefill_batch > batch:
        raise ValueError(
            f"prefill-batch={prefill_batch} must be at most batch={batch} beside a peer, which has no more"
        )
    for python in peer_python:
        peers.find_script(peers.which_peer(python))
    lm, _ = load(model, dtype=kind, device=on)
    new = WARM_STEPS + rounds * (steps * (2 if beside else 1) + PROFILED)
    common.check_fits(lm, context, new)
    own, unfit = c.fitting(lm, c.kvfold_contenders(lm, wanted))
    theirs, skipped = c.transformers_contenders(lm, quantized)
    skipped = skipped + unfit
    with (
        measured("run", on, beside) as (tick, result),
        common.with_fast_linears(lm, fast_linears),
        busy(beside) as loops,
    ):
        threads = result["machine"]["threads"]
        guests = peers.waiting(
            peer_python, folder, [(one.name, one.budget) for one in own], context=context, batch=batch, dtype=kind,
            new_tokens=new, threads=threads,
        )  # fmt: skip
        with guests as (lanes, without):
            rows, rate = measure_run(
                lm, [*theirs, *own], context=context, batch=batch, steps=steps, rounds=rounds,
                prefill_batch=prefill_batch, peers=lanes, loops=loops, tick=tick,
            )  # fmt: skip
        weights = c.weight_bytes(lm)
        skipped = [*skipped, *without]
        skipped += [{"contender": lane.name, "reason": lane.failed} for lane in lanes if lane.failed is not None]
        if peak:
            rows, left_out = with_peaks(
                rows, tick, model=model, context=context, batch=max(1, prefill_batch), steps=steps, dtype=kind,
                device=str(on), threads=threads,
            )  # fmt: skip
            skipped = skipped + left_out
        result |= {
            "model": model, "dtype": kind, "context": context, "batch": batch, "prefill_batch": prefill_batch,
            "steps": steps, "rounds": rounds, "fast_linears": fast_linears, "weight_bytes": weights,
            "read_bandwidth": rate.to_dict(), "rows": [row.to_dict() for row in rows], "skipped": skipped,
            "probe_seconds": probe_seconds(lm),
        }  # fmt: skip
    title = f"{model}, {context:,} tokens, batch {batch}, {kind}{linears_of(fast_linears)}, on {hardware(result)}"
    shown = [tables.run_table(rows, rate.bytes_per_second, weights, title)]
    where = tables.parts_table(rows, rate.bytes_per_second, f"Where a step goes: {title}")
    shown += [where] if where.rows else []
    finish(result, shown, json, out, chart, lambda: charts.run_chart(rows, title), tables.peer_lines(rows))
    common.end(not unfit)


@app.command("growth")
def growth_command(
    model: common.Model = "smollm2-135m-instruct",
    methods: Methods = "full,kvfold,streamingllm,h2o",
    budget: Annotated[str, typer.Option("--budget", help="Fraction of the prompt, or tokens per KV head.")] = "512",
    context: Annotated[str, typer.Option("--context", help="Prompt tokens, several.")] = "512,1024,2048,4096",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows that are read together.")] = 1,
    steps: Steps = 12,
    rounds: Rounds = 2,
    prefills: Annotated[int, typer.Option("--prefills", min=1, help="Prompts that each cache reads.")] = 1,
    chunk: Annotated[
        int | None, typer.Option("--chunk", min=1, help="Prompts in chunks: what is kept is chosen after each.")
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic/--no-dynamic", help="Also transformers' DynamicCache.")] = True,
    dtype: Kind = "float32",
    device: common.Device = "cpu",
    fast_linears: common.FastLinears = False,
    json: common.Json = False,
    out: Out = None,
    chart: Chart = None,
) -> None:
    """Seconds and bytes as the context grows, and the exponent of their growth, beside DynamicCache's."""
    wanted, kind, contexts = methods_of(methods, budget), known_dtype(dtype), sorted(set(integers("context", context)))
    if len(contexts) < 2:
        raise ValueError(f"context={context!r} must be at least two different numbers of tokens")

    from kvfold.artefacts.probed import probe_seconds
    from kvfold.bench import chart as charts
    from kvfold.bench import contenders as c
    from kvfold.bench import tables
    from kvfold.bench.growth import exponents, flat_lines, measure_growth
    from kvfold.models.load import load

    on = prepared(device, out, chart)
    lm, _ = load(model, dtype=kind, device=on)
    window = getattr(lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    own, unfit = c.fitting(lm, c.kvfold_contenders(lm, wanted, chunk))
    entrants = [*(c.transformers_contenders(lm, quantized=False)[0] if dynamic else ()), *own]
    with measured("growth", on) as (tick, result), common.with_fast_linears(lm, fast_linears):
        rows, rate = measure_growth(
            lm, entrants, contexts, batch=batch, steps=steps, rounds=rounds, prefills=prefills, tick=tick
        )
        found = exponents(rows)
        result |= {
            "model": model, "dtype": kind, "batch": batch, "steps": steps, "rounds": rounds, "prefills": prefills,
            "chunk": chunk, "window": window, "fast_linears": fast_linears,
            "weight_bytes": c.weight_bytes(lm), "read_bandwidth": rate.to_dict(),
            "rows": [row.to_dict() for row in rows], "exponents": [each.to_dict() for each in found],
            "probe_seconds": probe_seconds(lm), "skipped": unfit,
        }  # fmt: skip
    read = f", prompts in chunks of {chunk:,}" if chunk else ""
    title = f"{model}, batch {batch}, {kind}{linears_of(fast_linears)}{read}, on {hardware(result)}"
    lines = flat_lines(rows)
    if window is not None and contexts[-1] > window:
        lines.append(
            f"beyond the model's window of {window:,} tokens only the cost counts: the text means nothing there"
        )
    table = tables.growth_table(rows, found, rate.bytes_per_second, title)
    finish(result, [table], json, out, chart, lambda: charts.growth_chart(rows, title), lines)
    common.end(not unfit)


# -- what the four share ------------------------------------------------------------------------------------


def integers(name: str, text: str) -> list[int]:
    """Positive numbers separated by commas. Raises ValueError that names the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name}={text!r} must be positive whole numbers separated by commas")
    return list(dict.fromkeys(int(part) for part in parts))


def known_dtype(text: str) -> str:
    """A dtype that attention can be measured in. Raises ValueError."""
    if text not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={text!r} must be float32, bfloat16 or float16")
    return text


def methods_of(text: str, budget: str) -> list[tuple[str, Any]]:
    """Methods by the names that they were asked for by, with the budget where they take one. Raises ValueError."""
    from kvfold.evaluation.compare import split_names, with_budget

    value = common.number(budget)
    return [(name, with_budget(name, value)) for name in dict.fromkeys(split_names(text))]


def formats_of(text: str) -> dict[str, Any]:
    """Formats by the names of methods that hold every token in them. Raises ValueError for other methods."""
    from kvfold.evaluation.compare import split_names
    from kvfold.methods.registry import list_methods, parse

    kinds, found = {info.cls: info.kind for info in list_methods()}, {}
    for name in dict.fromkeys(split_names(text)) if text else ():
        method = parse(name)
        if kinds.get(type(method)) not in ("quantize", "sparse") or method.format is None:
            raise ValueError(
                f"formats={name!r} must be a method of kind quantize or sparse with one format, as kivi(bits=4)"
            )
        found[name] = method.format
    return found


def prepared(device: str, out: Path | None, chart: Path | None) -> Any:
    """The device as torch has it. Raises ValueError for it, or for a path that can't be written."""
    from kvfold.evaluation.chart import check_chart_path
    from kvfold.files import check_regular
    from kvfold.models.load import checked_device

    if chart is not None:
        check_chart_path(chart)
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise ValueError(f"out={str(out)!r} must be a .json file in a folder that is there")
    if out is not None:
        check_regular(out, "out")
    return checked_device(device)


def peer_folder(model: str) -> Path:
    """The folder of a model for a peer, which knows no bundled names. Raises ValueError for a hub id."""
    from kvfold.models.bundled import Bundled
    from kvfold.models.load import convert_bundled, convert_gguf, find

    place = find(model)
    if isinstance(place, Bundled):
        place = convert_bundled(place, True)
    elif isinstance(place, Path) and place.is_file():
        place = convert_gguf(place, True)
    if not isinstance(place, Path):
        raise ValueError(f"model={model!r} must be a bundled name, a folder or a GGUF file for --peer-python")
    return place


def with_peaks(
    rows: Sequence["endtoend.RunRow"], tick: Callable[[str], None], **options: Any
) -> tuple[list["endtoend.RunRow"], list[dict[str, str]]]:
    """The rows with each cache's peak memory, see `measure_peak`, and those whose process failed."""
    from kvfold.bench.peak import measure_peak

    found, skipped = [], []
    for row in rows:
        if row.separate_process:  # which has told its own
            found.append(row)
            continue
        tick(f"peak memory: {row.contender}, in a process of its own")
        try:
            row = replace(row, memory=measure_peak(contender=row.contender, budget=row.budget, **options))
        except RuntimeError as error:  # what was timed so far shall not go with it
            skipped.append({"contender": f"{row.contender}, peak memory", "reason": str(error)})
        found.append(row)
    return found, skipped


@contextmanager
def measured(bench: str, device: Any, beside: int = 0) -> Iterator[tuple[Callable[[str], None], dict[str, Any]]]:
    """A way to say on stderr what is going on, and the result that begins with what the machine is.

    `beside`: busy programs that each round is played beside once more.
    """
    from kvfold.bench.machine import Elsewhere, describe

    result: dict[str, Any] = {"format": FORMAT, "bench": bench, "machine": describe(device)}
    result["machine"]["beside"] = beside
    others = Elsewhere()
    with common.stderr.status("", refresh_per_second=1) as status:
        yield status.update, result
    result["machine"]["cores_busy_elsewhere"] = others.cores()


def linears_of(fast: bool) -> str:
    """What a title says of the model's linear layers."""
    return ", fast linears" if fast else ""


def hardware(result: dict[str, Any]) -> str:
    """The GPU, or the processor with its threads."""
    machine = result["machine"]
    meanwhile = f"; beside: {machine['beside']} busy" if machine["beside"] else ""
    return (machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['instructions']}") + meanwhile


def finish(
    result: dict[str, Any], shown: Sequence[Table], json: bool, out: Path | None, chart: Path | None,
    draw: Callable[[], Any], lines: Sequence[str] = (),
) -> None:  # fmt: skip
    """Print a result (tables, then lines), write and draw it."""
    from kvfold.artefacts.probed import probe_note
    from kvfold.evaluation.chart import save_chart
    from kvfold.files import write_json

    if out is not None:
        write_json(out, result, argument="out")
        common.stderr.print(f"JSON: {out}")
    if json:
        common.print_json(result)
    else:
        for table in shown:
            common.show(table)
        for line in lines:
            print(line)
        if note := probe_note(result.get("probe_seconds", {})):
            print(note)
        for left_out in result.get("skipped", ()):
            print(f"left out: {left_out['contender']}: {left_out['reason']}")
    common.say_busy(result["machine"]["cores_busy_elsewhere"])
    if chart is not None:
        save_chart(draw(), chart)
        common.stderr.print(f"chart: {chart}")
