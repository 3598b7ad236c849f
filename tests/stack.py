"""Layers without a model: views that share one pass, and a method that decides about them as a cache would ask it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvfold.methods import Method
from kvfold.methods.base import decided
from kvfold.views import LayerView


class Stack:
    """Reads a prompt, layer by layer; what is left of every layer after each of them is in `stages`."""

    prefill = True

    def __init__(self, method: Method, views: Sequence[LayerView]):
        self.method, self.step, self.done = method, {}, []
        self.stages: list[list[list[list[list[int]]]]] = []
        for ordinal, view in enumerate(views):
            place = replace(view.place, ordinal=ordinal, paged=tuple(range(len(views))), step=self.step)
            self.done.append(self._decide(replace(view, place=place), method.after_prefill(replace(view, place=place))))
            for layer, decisions in method.after_layer(self, ordinal).items():
                self.done[layer] = self._decide(self.done[layer], decisions)
            self.stages.append([positions(layer) for layer in self.done])

    @staticmethod
    def _decide(view: LayerView, decisions: Any) -> LayerView:
        for decision in decided(decisions):
            view = view.apply(decision)
        return view

    def __getitem__(self, ordinal: int) -> LayerView:
        view = self.done[ordinal]
        none = replace(
            view.queries,
            states=view.queries.states[:, :, :0],
            valid=view.queries.valid[:, :0],
            lse=view.queries.lse[:, :, :0],
            positions=view.queries.positions[:, :0],
        )
        return replace(view, queries=none, memo={})

    def __len__(self) -> int:
        return len(self.done)

    def kept(self) -> list[list[list[list[int]]]]:
        """kept[layer][row][head] in the end."""
        return self.stages[-1]

    def sizes(self) -> list[list[list[int]]]:
        """Tokens of each layer, row and head in the end."""
        return [[[len(head) for head in row] for row in layer] for layer in self.kept()]


def positions(view: LayerView) -> list[list[list[int]]]:
    """Text positions that a view holds, [row][head]."""
    place: Tensor = view.positions
    rows = range(place.shape[0])
    return [[place[b, h][view.valid[b, h]].tolist() for h in range(view.heads)] for b in rows]
