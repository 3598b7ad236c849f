"""What the commands share: options, loading, reading a document, writing JSON."""

import ast
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvfold import __version__

stderr = Console(stderr=True)

Model = Annotated[str, typer.Option("--model", help="Bundled name, transformers id, folder, or GGUF file.")]
File = Annotated[Path, typer.Option("--file", help="The document, a UTF-8 text file; - reads standard input.")]
Ask = Annotated[str | None, typer.Option("--ask", help="A question about it, put after the document.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
SHORTEST = 16
Context = Annotated[int | None, typer.Option("--context", min=SHORTEST, help="Longest prompt; cut from its middle.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 (default: by device).")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
FastLinears = Annotated[
    bool, typer.Option("--fast-linears", help="Let the model's linear layers take the fastest way for few rows (CPU).")
]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template, if it has one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def show(what: RenderableType) -> None:
    """On standard output. A file or a pipe has no width of its own: there a table is as wide as it likes to be.

    Where a terminal is too narrow for a row of a table, each cell gets a line.
    """
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=180)
    if (
        isinstance(what, Table)
        and console.measure(what, options=console.options.update(width=999)).minimum > console.width
    ):
        what = turned(what)
    console.print(what)


def turned(table: Table) -> Table:
    """A table with a line for each cell: the column's name, then what stands there; rows apart."""
    lines = Table(title=table.title, box=None, show_header=False, pad_edge=False)
    lines.add_column(style="dim")
    lines.add_column(overflow="fold")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, row, strict=True):
            lines.add_row(str(column.header).replace("\n", " "), cell)
        lines.add_row()
    return lines


def read_document(path: Path) -> str:
    """The text of a file, or of standard input for `-`. Raises ValueError where there is none, or it is not text."""
    if str(path) != "-" and not path.is_file():
        raise ValueError(f"file={str(path)!r} is not a file")
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        text.encode()  # standard input may be read with what it can't decode in it
    except UnicodeError as error:
        raise ValueError(f"file={str(path)!r} is not UTF-8 text ({error})") from None
    if not text.strip():
        raise ValueError(f"file={str(path)!r} is empty")
    return text


def check_fits(model: Any, tokens: int, new: int, about: str = "") -> None:
    """Raise ValueError where prompt and answer exceed the model's context."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens + new > limit:
        room = limit - new
        way_out = (
            f"--context {room} cuts the document in its middle" if room >= SHORTEST else "ask for fewer new tokens"
        )
        raise ValueError(
            f"the prompt has {about}{tokens} tokens and the answer up to {new}, but the model's context is {limit}; "
            f"{way_out}"
        )


LONG = 2**20
"""Characters from which on a document is not encoded whole before it is known that it fits."""


def read_prompt(
    model: Any, tokenizer: Any, document: str, ask: str | None, *, chat: bool, context: int | None, new: int
) -> tuple[Any, int]:
    """The prompt's ids (1, T), and how many tokens `context` cut from it (of a long one about), said on stderr, too.

    Raises ValueError where it and `new` tokens of answer exceed the model's context.
    """
    from kvfold.evaluation.prompts import build_prompt, count_up_to, ends_of

    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if len(document) > LONG and context is not None:
        ends, per_character = ends_of(tokenizer, document, context)
        ids = build_prompt(tokenizer, ends, ask, chat=chat, limit=context)["input_ids"]
        total = round(per_character * len(document))
        stderr.print(
            f"cut about {total - ids.shape[1]:,} of {total:,} tokens, from the document's middle", highlight=False
        )
        check_fits(model, ids.shape[1], new)
        return ids, total - ids.shape[1]
    if len(document) > LONG and limit is not None:
        check_fits(model, count_up_to(tokenizer, document, limit), new, "at least ")
    ids = whole = build_prompt(tokenizer, document, ask, chat=chat)["input_ids"]
    if context is not None and whole.shape[1] > context:
        ids = build_prompt(tokenizer, document, ask, chat=chat, limit=context)["input_ids"]
    if cut := whole.shape[1] - ids.shape[1]:
        stderr.print(f"cut {cut:,} of {whole.shape[1]:,} tokens, from the document's middle", highlight=False)
    check_fits(model, ids.shape[1], new)
    return ids, cut


def number(text: str) -> float | int:
    """A budget from the command line: 512 is tokens per KV head, 0.35 a fraction. Raises ValueError."""
    try:
        if text.strip() == "1":
            stderr.print("budget 1 is one token per KV head; 1.0 keeps everything", highlight=False)
        return int(text) if text.strip().lstrip("-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"budget={text!r} must be a fraction (0.35) or tokens per KV head (512)") from None


def memory(text: str, name: str = "memory") -> int | float:
    """What a cache may hold, from the command line: 512MiB are bytes, 0.1 a share (of `memory`). Raises ValueError."""
    from kvfold.hf.memory import parse_memory, parse_size

    if name != "memory":
        return parse_size(name, text)
    share = text.strip()
    return parse_memory(float(share) if share.replace(".", "", 1).isdigit() and "." in share else text)


def options(pairs: list[str]) -> dict[str, Any]:
    """Method options given as name=value; values are read as Python literals, else as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"option={pair!r} must be of the form name=value")
        if name in found:
            raise ValueError(f"option={pair!r}: {name} is given twice")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"kvfold": __version__} | {name: version(name) for name in ("torch", "transformers")}


def with_fast_linears(model: Any, wanted: bool) -> AbstractContextManager[Any]:
    """A block in which the model's linear layers are fast ones, where that is wanted."""
    if not wanted:
        return nullcontext()
    from kvfold.hf.linears import fast_linears

    return fast_linears(model)


@contextmanager
def reading(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, gone at the end, for the share of a prompt that is read; nothing before the first is told.

    Nor where stderr is no terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        job = bar.add_task(escape(what), total=1.0, visible=False)
        yield lambda share: bar.update(job, completed=share, visible=True)


def say_busy(cores: float | None) -> None:
    """Say on stderr that other programs kept cores busy while something was timed."""
    if cores is not None and cores > 0.2:
        stderr.print(f"other programs kept {cores:.2f} cores busy meanwhile: the seconds are worth little")


def say_left_out(skipped: Sequence[Mapping[str, str]]) -> None:
    """Say on stderr what is missing from a result, and why."""
    for each in skipped:
        line = f"left out: {each['contender']}: {each['reason']}"
        stderr.print(line, markup=False, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Data on standard output; in escapes where that can't hold their characters."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2)
    print(text)


def end(complete: bool) -> NoReturn:
    """End the command: with 1 where something that was asked for is missing, which has been said on stderr."""
    raise typer.Exit(0 if complete else 1)


def kibi(nbytes: float) -> str:
    """Bytes in KiB: of what a step moves."""
    return f"{nbytes / 2**10:,.1f} KiB"


def size(nbytes: int) -> str:
    """Bytes in MiB."""
    return f"{nbytes / 2**20:.1f} MiB"
