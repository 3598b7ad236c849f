"""The command line: exit codes 0 done, 1 failed, 2 wrong usage; `--json` everywhere; progress on stderr."""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

import typer

from kvfold import __version__
from kvfold.cli import bench, bench_reading, calibrate, compare, eval, methods, models, plan, report, run, uptrain
from kvfold.waiting import rest_between_products

app = typer.Typer(
    name="kvfold",
    help="Long contexts with a small KV cache, for transformers models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("compare")(compare.compare_command)
app.command("methods")(methods.methods)
app.command("models")(models.models)
app.command("plan")(plan.plan)
app.command("eval")(eval.eval_command)
app.command("calibrate")(calibrate.calibrate_command)
app.command("uptrain")(uptrain.uptrain_command)
app.command("report")(report.report_command)
bench.app.command("reading")(bench_reading.reading_command)
app.add_typer(bench.app, name="bench")


def _version(show: bool | None) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool | None = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it."),
) -> None:
    """Long contexts with a small KV cache, for transformers models."""


def main() -> None:
    """Run the command; errors become a line on stderr and an exit code."""
    rest_between_products()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that has no such character shows what it would be
            stream.reconfigure(errors="backslashreplace")
    try:
        check_words(sys.argv[1:])
        app()
    except ValueError as error:  # kvfold's own checks: the argument, its value, what is allowed
        print(f"kvfold: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so again at its end
        sys.exit(1)
    except (OSError, RuntimeError, ImportError, MemoryError) as error:
        print(f"kvfold: {str(error) or 'not enough memory'}", file=sys.stderr)
        sys.exit(1)


def check_words(words: Sequence[str]) -> None:
    """Raise ValueError for an argument that is no text: it would break what it is printed on, or written into."""
    for number, word in enumerate(words, 1):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"argument {number}, {word!a}, is not text in {sys.getfilesystemencoding()}; a file of "
                "such a name can be given another, or its text on standard input (--file -)"
            ) from None
