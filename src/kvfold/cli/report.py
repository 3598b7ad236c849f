"""`kvfold report`: one page and a table from result folders."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import common


def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `kvfold eval` wrote.", metavar="FOLDER...")],
    out: Annotated[Path | None, typer.Option("--out", help="Write an HTML page that opens without a network.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here, not to stdout.")] = None,
    text_limit: Annotated[
        int | None,
        typer.Option("--text-limit", min=0, help="Characters of examples in the page, others without their texts."),
    ] = None,
    json: common.Json = False,
) -> None:
    """Tables, figures and single examples of one or several sweeps."""
    from kvfold.evaluation.report import check_page_path, make_report
    from kvfold.files import check_regular, write_whole

    if out is not None:
        check_page_path(out)
    if markdown is not None and not markdown.parent.is_dir():
        raise ValueError(f"markdown={str(markdown)!r}: there is no folder {str(markdown.parent)!r}")
    if markdown is not None:
        check_regular(markdown, "markdown")
    with common.stderr.status("reading"):
        report = make_report(folders)
    tables = report.markdown()
    if markdown is not None:
        write_whole(markdown, tables.encode(), "markdown")
    if out is not None:
        with common.stderr.status("writing the page"):
            page = report.html() if text_limit is None else report.html(text_limit)
            write_whole(out, page.encode(), "out")
        common.stderr.print(f"page: {out}")
    if json:
        common.print_json({"sweeps": report.results.sweeps, "rows": [cell.to_dict() for cell in report.cells]})
    elif markdown is None:
        print(tables, end="")
