"""Methods that share a budget over layers by what the prompt does in each: layers shrink as further ones are read."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvfold.budgets.layers import share_out, tokens_each
from kvfold.decisions import Keep
from kvfold.methods.base import CacheView
from kvfold.methods.scored import Scored
from kvfold.scores import keep_top
from kvfold.views import LayerView


@dataclass
class Found:
    """One layer in a pass that reads a prompt."""

    signal: Tensor
    """(B, ...): what its share is worked out from."""
    held: np.ndarray
    """(B,) tokens that its longest head holds."""


@dataclass(frozen=True)
class Cascade(Scored):
    """Each layer leaves its scores in a column, and a signal; after it all layers so far share the whole budget anew.

    A layer that is done never wins by a further one, so cutting it at once to what it would have if no layer came
    after it takes nothing that it could keep in the end; after the last layer the integers sum to the budget.
    A subclass gives `measure`, `weights` and `fixed`.
    """

    def measure(self, view: LayerView) -> tuple[Float[Tensor, "B H T"], Tensor]:
        """Scores, and the signal of the layer with a row for each sequence."""
        raise NotImplementedError

    def weights(self, signals: list[Tensor], free: Float[Tensor, " B"], layers: int) -> Shaped[Tensor, "B N"]:
        """In what proportion the first N layers share a budget of `free` tokens for each of `layers` layers."""
        raise NotImplementedError

    @property
    def fixed(self) -> int:
        """Tokens that every layer keeps, as far as the budget goes."""
        raise NotImplementedError

    def at_most(self, view: LayerView) -> Int[Tensor, "B H"]:
        """What a layer may hold at all."""
        return view.count

    def due(self, ordinal: int, layers: int) -> bool:
        """Whether the budget is shared anew after this layer; it always is after the last."""
        return True

    @property
    def column(self) -> str:
        """Where the scores are carried."""
        return f"{self.info.slug}_score"

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        return self.measure(view)[0]

    def carried(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Mapping[str, Tensor]:
        return {self.column: scores}

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        raise NotImplementedError

    def after_prefill(self, view: LayerView) -> Keep:
        if isinstance(self.budget, float) and self.budget == 1.0:
            return Keep(view.valid)
        scores, signal = self.measure(view)
        counts = torch.minimum(view.count, self.at_most(view))
        found = view.place.step.setdefault(self.info.slug, {})
        found[view.place.ordinal] = Found(signal, counts.amax(1).cpu().numpy().astype(np.float64))
        return Keep(keep_top(view, scores, counts, self.always(view, counts)).mask, self.carried(view, scores))

    def after_layer(self, cache: CacheView, ordinal: int) -> Mapping[int, Keep]:
        found: dict[int, Found] = cache.step.get(self.info.slug, {})
        if ordinal not in found:
            return {}
        place = cache[ordinal].place
        last = ordinal == place.layers - 1
        if not (last or self.due(ordinal, place.layers)):
            return {}
        done = [found[i] for i in range(ordinal + 1)]
        shares = self._shares(done, tokens_each(self.budget, place.prompt, place.seen), place.layers)
        decisions = {}
        for i, layer in enumerate(done):
            room = np.ceil(shares[:, i] - 1e-6)
            if not last and (room >= layer.held).all():
                continue
            view = cache[i]
            if last:
                counts = view.budget(self.budget, [tuple(row) if row.sum() else (1.0,) * len(row) for row in shares])
            else:
                counts = torch.from_numpy(room).long().to(view.valid.device)[:, None].expand(-1, view.heads)
            layer.held = np.minimum(layer.held, room)
            decisions[i] = keep_top(view, view.columns[self.column], counts, self.always(view, counts))
        return decisions

    def _shares(self, done: list[Found], each: list[float], layers: int) -> np.ndarray:
        """Tokens of each layer that is done (B, N), those that it keeps in any case included; real numbers."""
        fixed = np.minimum(each, self.fixed)
        free = np.asarray(each) - fixed
        weights = self.weights([layer.signal for layer in done], torch.from_numpy(free), layers).double().cpu().numpy()
        held = np.stack([layer.held for layer in done], 1)
        rows = zip(weights, free * layers, held - fixed[:, None], strict=True)
        shares: np.ndarray = fixed[:, None] + np.stack([share_out(w, total, caps.clip(0)) for w, total, caps in rows])
        return shares
