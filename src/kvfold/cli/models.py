"""`kvfold models`: names that `kvfold.load` knows."""

from rich.table import Table

from kvfold.cli import common


def models(json: common.Json = False) -> None:
    """List the bundled models, and what has been converted to the cache folder."""
    from kvfold.hf.models import available

    infos = available()
    if json:
        common.print_json([info.to_dict() for info in infos])
        return
    table = Table()
    for name in ("model", "title", "context", "licence", "on disk"):
        table.add_column(name, overflow="fold")
    for info in infos:
        row = info.to_dict()
        held = common.size(row["nbytes"]) if row.get("nbytes") else "not yet"
        cells = (row["name"], row["title"], row.get("context"), row.get("licence"), held)
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    common.stdout.print(table)
