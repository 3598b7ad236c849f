"""`kvfold methods`: what there is to choose from."""

from inspect import getdoc
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvfold.cli import common

if TYPE_CHECKING:
    from kvfold.methods import MethodInfo


def methods(
    name: Annotated[str | None, typer.Argument(help="A slug: what it does, and its options.")] = None,
    json: common.Json = False,
) -> None:
    """List the methods: slug, title, paper, kind, options with their defaults; or all about one."""
    from kvfold.methods import get_method, list_methods
    from kvfold.methods.registry import broken_plugins

    if name is not None:
        info = get_method(name)
        if json:
            common.print_json(info.to_dict() | {"meanings": info.meanings})
        else:
            common.show(about(info))
        return
    infos = list_methods()
    if json:
        common.print_json([info.to_dict() for info in infos])
        common.end(not broken_plugins())
    table = Table()
    for name in ("method", "kind", "arXiv", "keeps", "options"):
        table.add_column(name, overflow="fold")
    for info in infos:
        options = ", ".join(f"{name}={value!r}" for name, value in info.options.items())
        table.add_row(info.slug, info.kind, info.paper or "-", info.summary, options or "-")
    common.show(table)
    common.end(not broken_plugins())


def about(info: "MethodInfo") -> Group:
    """A method's docstring and its options."""
    paper = f", arXiv:{info.paper}" if info.paper else ""
    parts = [" ".join(part.split()) for part in (getdoc(info.cls) or "").split("\n\n")]
    options = Table(box=None, pad_edge=False)
    for head in ("option", "default", "what it is") if info.options else ():
        options.add_column(head, overflow="fold")
    for option, default in info.options.items():
        options.add_row(option, repr(default), info.meanings[option])
    return Group(Text("\n\n".join([f"{info.title} ({info.kind}{paper})", *parts]) + "\n"), options)
