"""`kvfold models`: names that `kvfold.load` knows."""

from dataclasses import asdict

from rich.table import Table

from kvfold.cli import common


def models(json: common.Json = False) -> None:
    """List the bundled models and the GGUF files that have been converted, with their place on disk."""
    from kvfold.models.bundled import available

    infos = available()
    if json:
        rows = [asdict(info) for info in infos]
        common.print_json([{**row, "folder": row["folder"] and str(row["folder"])} for row in rows])
        return
    table = Table()
    for name in ("model", "title", "context", "licence", "on disk", "source"):
        table.add_column(name, overflow="fold", justify="right" if name in ("context", "on disk") else "left")
    for info in infos:
        held = common.size(info.nbytes) if info.folder else "not yet"
        table.add_row(info.name, info.title, f"{info.context_length:,}", info.licence, held, info.source)
    common.show(table)
