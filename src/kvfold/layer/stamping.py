"""The columns that methods give new tokens by their keys and values, before a layer stores them."""

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.formats import Chunk, LateChunk
from kvfold.layer.deciding import Moment


def stamped(moment: Moment, tokens: Chunk) -> Chunk:
    """New tokens with what the methods of their rows give them (`Method.stamp`); zeros in rows of other methods."""
    heard = [(i, group) for i, group in enumerate(moment.rows.groups) if group.method.listens("stamp")]
    if not heard:
        return tokens
    found = dict[str, Tensor]()
    for number, group in heard:
        rows = None if group.rows is None else torch.from_numpy(group.rows).to(tokens.valid.device)
        some = tokens if rows is None else _of_rows(tokens, rows)
        with torch.autocast(tokens.valid.device.type, enabled=False):
            columns = group.method.stamp(some, moment.place(number, group.rows))
        for name, column in columns.items():
            whole = found.setdefault(name, column.new_zeros(tokens.valid.shape))
            whole[... if rows is None else rows] = column
        if rows is not None:
            moment.rows.remember(number, frozenset(columns))
    return tokens.but(tokens.valid, {**tokens.columns, **found})


def _of_rows(tokens: Chunk, rows: Int[Tensor, " N"]) -> Chunk:
    """The tokens of some rows."""
    columns = {name: column[rows] for name, column in tokens.columns.items()}
    return LateChunk(lambda: tokens.keys[rows], lambda: tokens.values[rows], tokens.valid[rows], columns)
