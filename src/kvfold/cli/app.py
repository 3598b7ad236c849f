"""The command line: exit codes 0 done, 1 failed, 2 wrong usage; `--json` everywhere; progress on stderr."""

import sys

import typer

from kvfold import __version__
from kvfold.cli import bench, calibrate, compare, eval, methods, models, plan, report, run

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
app.command("report")(report.report_command)
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
    """Run the command; errors become one line on stderr and an exit code."""
    try:
        app()
    except ValueError as error:  # kvfold's own checks: the argument, its value, what is allowed
        print(f"kvfold: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError) as error:
        print(f"kvfold: {error}", file=sys.stderr)
        sys.exit(1)
