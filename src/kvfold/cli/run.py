"""`kvfold run`: read a document with one method, answer a question, say what it took."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from kvfold.cli import common


def run(
    file: common.File,
    model: common.Model = "smollm2-135m-instruct",
    method: Annotated[str, typer.Option("--method", help="A slug, or a composition such as 'a(x=1) | b'.")] = "kvfold",
    budget: Annotated[str | None, typer.Option("--budget", help="Fraction of the prompt, or tokens per head.")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="What the cache may hold: 512MiB, or 0.1 of a dense float16 cache's.")
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize/--no-quantize", help="With --memory: choose bits with tokens.")
    ] = True,
    fast_memory: Annotated[
        str | None, typer.Option("--fast-memory", help="What of the cache may be in fast memory, 256MiB.")
    ] = None,
    spill: Annotated[
        str | None,
        typer.Option("--spill", help="With --fast-memory: a folder for the rest; without, it is on the host."),
    ] = None,
    option: Annotated[list[str], typer.Option("--option", "-o", help="Method option name=value.")] = [],  # noqa: B006
    ask: common.Ask = None,
    max_new_tokens: common.NewTokens = 64,
    context: common.Context = None,
    prefill_chunk: Annotated[int | None, typer.Option("--prefill-chunk", min=1, help="Read in chunks.")] = None,
    dtype: common.Dtype = None,
    device: common.Device = "cpu",
    chat: common.Chat = True,
    fast_linears: common.FastLinears = False,
    layers: Annotated[bool, typer.Option("--layers", help="Also print what each layer holds.")] = False,
    json: common.Json = False,
) -> None:
    """Read a document with one method, answer a question about it, and say what that took.

    The answer is written as it comes.
    """
    given = common.options(option)
    if budget is not None:
        if "budget" in given:
            raise ValueError(f"budget={budget!r} is given twice: option='budget={given['budget']}' says it, too")
        given["budget"] = common.number(budget)

    from kvfold.files import check_folder
    from kvfold.methods import parse

    chosen = parse(method, **given)
    limit = None if memory is None else common.memory(memory)
    if fast_memory is None and spill is not None:
        raise ValueError(f"spill={spill!r} is for fast_memory=, which is not given")
    if fast_memory is not None:
        common.memory(fast_memory, "fast_memory")
        spill = None if spill is None else str(check_folder(spill, "spill"))
    if limit is None and not quantize:
        raise ValueError("quantize=False is for memory=, which is not given")
    if limit is not None and "budget" in given:
        raise ValueError(f"memory={memory!r} sets the budget; budget={given['budget']!r} is given, too")
    document = common.read_document(file)

    import torch
    from transformers import TextStreamer

    from kvfold.artefacts.probed import probe_note, probe_seconds
    from kvfold.evaluation.decoding import decode, prefill
    from kvfold.evaluation.memory import resident_bytes
    from kvfold.hf.cache import Cache, limited
    from kvfold.models.load import load

    lm, tokenizer = load(model, dtype=dtype, device=device)
    ids, cut = common.read_prompt(
        lm, tokenizer, document, ask, chat=chat, context=context, new=max_new_tokens
    )  # fmt: skip
    if limit is not None:
        chosen = limited(lm, chosen, limit, context=ids.shape[1] + max_new_tokens, quantize=quantize)
    cache = Cache(lm, chosen, fast_memory=fast_memory, spill=spill)
    before = resident_bytes()
    written = None if json else TextStreamer(tokenizer, skip_special_tokens=True)
    with common.with_fast_linears(lm, fast_linears):
        with common.reading(f"reading {ids.shape[1]:,} tokens with {chosen}") as told:
            read = prefill(lm, ids, cache, prefill_chunk, told)
            held = cache.report()
            kept = cache.kept_tokens
            after = resident_bytes()
        answer = decode(lm, cache, read.logits, max_new_tokens, None if written is None else written.put)
    if written is not None:
        written.end()
    result = {
        "model": model,
        "method": str(chosen),
        "memory": memory,
        "answer": tokenizer.decode(answer.tokens, skip_special_tokens=True).strip(),
        "prompt_tokens": ids.shape[1],
        "cut_tokens": cut,
        "kept_tokens": kept,
        "nbytes": held.nbytes,
        "dense_nbytes": held.dense_nbytes,
        "ratio": held.ratio,
        "nbytes_at_end": cache.nbytes,
        "resident_nbytes_at_end": cache.resident_nbytes,
        "spilled": cache.report().to_dict()["spilled"],
        "resident_bytes_before": before,
        "resident_bytes_after_prefill": after,
        "new_tokens": len(answer.tokens),
        "prefill_seconds": read.seconds,
        "probe_seconds": probe_seconds(lm),
        "decode_tokens_per_second": answer.rate,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "threads": torch.get_num_threads(),
        "fast_linears": fast_linears,
        "versions": common.versions(),
    }
    if json:
        common.print_json({**result, "layers": held.to_dict()["layers"]} if layers else result)
        return
    table = Table(box=None, show_header=False)
    rate = f"{answer.rate:.1f} tokens/s" if answer.rate else "-"
    for name, value in (
        ("method", str(chosen)),
        ("prompt", f"{ids.shape[1]} tokens, {read.seconds:.1f} s"),
        ("kept", f"{kept:.0f} tokens per KV head"),
        ("KV cache", f"{common.size(held.nbytes)} of {common.size(held.dense_nbytes)} ({held.ratio:.3f})"),
        ("decode", f"{rate}, fast linears" if fast_linears else rate),
        *moved_rows(held, cache.report(), len(answer.tokens) - 1),
    ):
        table.add_row(f"[dim]{name}[/dim]", value)
    common.stderr.print(table)
    if note := probe_note(probe_seconds(lm)):
        common.stderr.print(note)
    if layers:
        common.stderr.print(held.table())


def moved_rows(before: Any, after: Any, steps: int) -> Iterator[tuple[str, str]]:
    """Where some of a cache is elsewhere: what of it is here, and what a step of the answer moved, of `steps`."""
    start, end = before.spilled, after.spilled
    if end is None:
        return
    yield "in memory", f"{common.size(after.resident_nbytes)} of {common.size(end.fast_memory)}"
    hits, misses, brought, written = (
        getattr(end, name) - getattr(start, name) for name in ("hits", "misses", "brought_nbytes", "written_nbytes")
    )
    if steps > 0:
        name = "host" if end.host_nbytes else "disk"
        yield name, f"{common.kibi(brought / steps)} read, {common.kibi(written / steps)} written a token"
        yield "", f"{hits / max(1, hits + misses):.0%} of blocks were in memory"
