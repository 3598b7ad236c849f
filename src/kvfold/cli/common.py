"""What the commands share: options, loading, reading a document, writing JSON."""

import ast
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvfold import __version__

stderr = Console(stderr=True)
stdout = Console()

Model = Annotated[str, typer.Option("--model", help="Bundled name, transformers id, folder, or GGUF file.")]
File = Annotated[Path, typer.Option("--file", help="The document, a UTF-8 text file; - reads standard input.")]
Ask = Annotated[str | None, typer.Option("--ask", help="A question about it, put after the document.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Context = Annotated[int | None, typer.Option("--context", min=16, help="Longest prompt; cut from its middle.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 (default: by device).")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template, if it has one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def read_document(path: Path) -> str:
    """The text of a file, or of standard input for `-`. Raises ValueError where there is none, or it is not text."""
    if str(path) != "-" and not path.is_file():
        raise ValueError(f"file={str(path)!r} is not a file")
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"file={str(path)!r} is not UTF-8 text ({error})") from None
    if not text.strip():
        raise ValueError(f"file={str(path)!r} is empty")
    return text


def check_fits(model: Any, tokens: int, new: int) -> None:
    """Raise ValueError where prompt and answer exceed the model's context."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens + new > limit:
        raise ValueError(
            f"the prompt has {tokens} tokens and the answer up to {new}, but the model's context is {limit}; "
            f"--context {limit - new} cuts the document in its middle"
        )


def number(text: str) -> float | int:
    """A budget from the command line: 512 is tokens per KV head, 0.35 a fraction. Raises ValueError."""
    try:
        return int(text) if text.strip().lstrip("-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"budget={text!r} must be a fraction (0.35) or tokens per KV head (512)") from None


def options(pairs: list[str]) -> dict[str, Any]:
    """Method options given as name=value; values are read as Python literals, else as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"option={pair!r} must be of the form name=value")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"kvfold": __version__} | {name: version(name) for name in ("torch", "transformers")}


def print_json(data: Any) -> None:
    """Data on standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def size(nbytes: int) -> str:
    """Bytes in MiB."""
    return f"{nbytes / 2**20:.1f} MiB"
