"""The columns that methods give new tokens by their keys and values, before a layer stores them."""

from dataclasses import replace

import torch
from torch import Tensor

from kvfold.formats import Chunk
from kvfold.layer.deciding import Moment
from kvfold.views import LayerView


def stamped(moment: Moment, tokens: Chunk) -> Chunk:
    """New tokens with what the methods of their rows give them (`Method.stamp`); zeros in rows of other methods."""
    heard = [(i, group) for i, group in enumerate(moment.rows.groups) if group.method.listens("stamp")]
    if not heard:
        return tokens
    found = dict[str, Tensor]()
    for number, group in heard:
        rows = None if group.rows is None else torch.from_numpy(group.rows).to(tokens.valid.device)
        some = tokens if rows is None else tokens.of_rows(rows)
        with torch.autocast(tokens.valid.device.type, enabled=False):
            columns = group.method.stamp(some, moment.place(number, group.rows))
        for name, column in columns.items():
            whole = found.setdefault(name, column.new_zeros(tokens.valid.shape))
            whole[... if rows is None else rows] = column
        if rows is not None:
            moment.rows.remember(number, frozenset(columns))
    return tokens.but(tokens.valid, {**tokens.columns, **found})


def labelled(moment: Moment, view: LayerView) -> LayerView:
    """A view of a prompt that another cache has read, with the columns that our methods give its tokens."""
    if labels := moment.labels():
        tokens = view.tokens
        wide = {name: label[:, None].expand(tokens.valid.shape) for name, label in labels.items()}
        view = replace(view, tokens=tokens.but(tokens.valid, {**tokens.columns, **wide}))
    tokens = stamped(moment, view.tokens)
    if tokens is view.tokens:
        return view
    return replace(view, tokens=tokens, queries=replace(view.queries, plain=False))
