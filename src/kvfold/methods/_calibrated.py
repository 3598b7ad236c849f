"""What the calibrated methods share: what `bind` found, and tables with a row for each paged layer as options."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, float32, tensor

from kvfold import artefacts
from kvfold.methods.base import Method
from kvfold.options import shown
from kvfold.views import LayerView

Table = tuple[tuple[float, ...], ...]
"""Numbers of heads: a row for each paged layer."""
M = TypeVar("M", bound=Method)


def check_table(name: str, table: object) -> None:
    """Raise ValueError unless `table` is None, or a tuple of rows (tuples) of finite numbers >= 0, all as long."""
    if table is None:
        return
    rows = table if isinstance(table, tuple) else ()
    lengths = {len(row) if isinstance(row, tuple) else 0 for row in rows}
    if len(lengths) != 1 or 0 in lengths or not all(_measured(n) for row in rows for n in row):
        raise ValueError(
            f"{name}={shown(table)} must be rows of finite numbers >= 0 as a tuple of tuples, one row for each paged "
            "layer, one number a head"
        )


def _measured(number: object) -> bool:
    real = isinstance(number, int | float) and not isinstance(number, bool)
    return real and 0 <= number <= sys.float_info.max  # type: ignore[operator]


def filled(method: M, model: Any, names: dict[str, str]) -> M:
    """A copy of `method` whose empty options hold the tables of its artefact: `names` are option -> table.

    The method itself where it needs nothing. Raises ValueError where there is no artefact, or not with this table.
    """
    empty = [option for option in names if getattr(method, option) is None]
    if not empty:
        return method
    path = getattr(method, "calibration", None)
    tables = {option: measured(method.info.slug, model, names[option], path) for option in empty}
    return replace(method, **tables, calibration=None)  # type: ignore[type-var]


def measured(slug: str, model: Any, table: str, path: str | None = None) -> Any:
    """A table of a method's artefact. Raises ValueError where there is no artefact, or not with such a table."""
    found = artefacts.find(slug, model, path)
    if table not in found.data:
        raise ValueError(f"the calibration of {slug} for {found.model.get('name')!r} lacks {table!r}")
    try:
        return rows(found.data[table])
    except (TypeError, ValueError, RecursionError, OverflowError):
        said = shown(found.data[table])
        raise ValueError(
            f"the calibration of {slug} for {found.model.get('name')!r} has {table}={said}, no table of numbers"
        ) from None


def bound_data(slug: str, path: str | None, what: str) -> dict[str, Any]:
    """What an artefact holds that `bind` has found. Raises ValueError that asks for `what` where nobody has bound."""
    if path is None:
        raise unbound(slug, what)
    return artefacts.read(slug, path).data


def unbound(slug: str, what: str, calibration: str | None = None) -> ValueError:
    """What is to be raised where `bind` was not asked; `calibration`: whose it is, None: the method's own."""
    made = artefacts.command(calibration or slug, "MODEL")
    return ValueError(f"{slug} needs {what}: give it to kvfold.Cache(model, ...), which finds them, after {made}")


def rows(numbers: Sequence[Any]) -> tuple[Any, ...]:
    """Lists as JSON has them, as tuples."""
    return tuple(rows(each) if isinstance(each, list | tuple) else float(each) for each in numbers)


def table_of(method: Method, view: LayerView, name: str, per: int) -> Table:
    """An option's table, of `per` heads a layer. Raises ValueError if it is empty or of another size."""
    table: Table | None = getattr(method, name)
    slug = method.info.slug
    if table is None:
        raise unbound(slug, name)
    if len(table) != view.place.layers or len(table[0]) != per:
        raise ValueError(
            f"{name} of {slug} has {len(table)} layers of {len(table[0])} heads; the model has {view.place.layers} "
            f"layers on pages, of {per}"
        )
    return table


def query_heads(view: LayerView) -> int:
    """Query heads of the model, of which a KV head serves a group."""
    return view.queries.states.shape[1]


def over_groups(scores: Table, heads: int) -> Float[Tensor, "L H"]:
    """The mean over each KV head's group of query heads."""
    table = tensor(scores, dtype=float32)
    return table.view(len(scores), heads, -1).mean(-1)
