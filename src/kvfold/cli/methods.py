"""`kvfold methods`: what there is to choose from."""

from rich.table import Table

from kvfold.cli import common
from kvfold.methods import list_methods


def methods(json: common.Json = False) -> None:
    """List the methods: slug, title, paper, kind, options with their defaults."""
    infos = list_methods()
    if json:
        common.print_json([info.to_dict() for info in infos])
        return
    table = Table()
    for name in ("method", "kind", "arXiv", "keeps", "options"):
        table.add_column(name, overflow="fold")
    for info in infos:
        options = ", ".join(f"{name}={value!r}" for name, value in info.options.items())
        table.add_row(info.slug, info.kind, info.paper or "-", info.summary, options or "-")
    common.stdout.print(table)
