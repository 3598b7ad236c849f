"""Methods that share a budget over layers by what the prompt does in each: layers shrink as further ones are read."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvfold.budgets import is_all
from kvfold.budgets.layers import share_out, tokens_each
from kvfold.methods.base import Decisions
from kvfold.methods.scored import Scored
from kvfold.scores import keep_top
from kvfold.views import CacheView, LayerView, Place
from kvfold.views.decisions import Keep

SHORT = "short_texts"


@dataclass
class Found:
    """One layer in a pass that reads a prompt."""

    signal: Tensor
    """(B, ...): what its share is worked out from."""
    whole: np.ndarray
    """(B,) tokens that its longest head could hold."""
    held: np.ndarray
    """(B,) tokens that it may hold now, if no further layer comes."""
    stored: np.ndarray
    """(B,) tokens that it has not dropped yet."""


@dataclass(frozen=True)
class Cascade(Scored):
    """Each layer leaves its scores in a column, and a signal; after it all layers so far share the whole budget anew.

    A layer that is done never wins by a further one, so cutting it at once to what it would have if no layer came
    after it takes nothing that it could keep in the end; after the last layer the integers sum to the budget.
    The newest layer is cut before it is stored, and the others only when all of them together hold `spare` tokens more
    than the budget: what the paper's code holds, which cuts them after every layer, is the newest one whole.
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

    def spare(self, newest: np.ndarray) -> np.ndarray:
        """What all layers may hold over the budget until the prompt is read; `newest`: the newest layer whole."""
        return newest

    @property
    def column(self) -> str:
        """Where the scores are carried."""
        return f"{self.info.slug}_score"

    def short(self, view: LayerView) -> Bool[Tensor, "B 1"]:
        """The rows whose text is no longer than the budget yet; on the view's device, once for the layers of a step."""
        found, key = view.place.step.setdefault(SHORT, {}), (self, view.valid.device)
        if key not in found:
            each = torch.tensor(self._each(view.place), dtype=torch.float32)
            found[key] = (view.place.seen <= each).to(view.valid.device)[:, None]
        rows: Tensor = found[key]
        return rows

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        return self.measure(view)[0]

    def carried(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Mapping[str, Tensor]:
        return {self.column: scores}

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        raise NotImplementedError

    def cut(self, view: LayerView, kept: Keep) -> Decisions:
        """What is decided about a layer of which `kept` is to stay."""
        return kept

    def after_prefill(self, view: LayerView) -> Decisions:  # type: ignore[override]
        if is_all(self.budget):
            return Keep(view.valid)
        scores, signal = self.measure(view)
        counts = torch.minimum(view.count, self.at_most(view))
        found, ordinal = view.place.step.setdefault(self.info.slug, {}), view.place.ordinal
        whole = counts.amax(1).cpu().numpy().astype(np.float64)
        mine = found[ordinal] = Found(signal, whole, whole, whole)
        if ordinal < view.place.layers - 1 and self.due(ordinal, view.place.layers):
            if len(found) <= ordinal:  # a plan asks of each layer by itself
                raise ValueError(f"method={self} shares tokens among layers as they are read: no plan of it")
            done = [found[i] for i in range(ordinal + 1)]
            for layer, room in zip(done, self._shares(done, view.place).T, strict=True):
                layer.held = np.minimum(layer.held, np.ceil(room - 1e-6))
            mine.stored = mine.held
            counts = torch.minimum(counts, _tokens(mine.held, counts))
        kept = keep_top(view, scores, counts, self.always(view, counts)).mask
        return self.cut(view, Keep(kept, self.carried(view, scores)))

    def after_layer(self, cache: CacheView, ordinal: int) -> Mapping[int, Decisions]:
        found: dict[int, Found] = cache.step.get(self.info.slug, {})
        if ordinal not in found:
            return {}
        place = cache[ordinal].place
        last = ordinal == place.layers - 1
        if not (last or self.due(ordinal, place.layers)):
            return {}
        done = [found[i] for i in range(ordinal + 1)]
        if last:
            shares = [tuple(row) if row.sum() else (1.0,) * len(row) for row in self._shares(done, place)]
        else:
            over = sum(layer.stored for layer in done) - np.asarray(self._each(place)) * place.layers
            if (over <= self.spare(done[-1].whole)).all():
                return {}
        decisions: dict[int, Decisions] = {}
        for i, layer in enumerate(done):
            if last or (layer.held < layer.stored).any():
                view = cache[i]
                counts = view.budget(self.budget, shares) if last else _tokens(layer.held, view.count)
                kept = keep_top(view, view.columns[self.column], counts, self.always(view, counts))
                decisions[i] = self.cut(view, kept)
                layer.stored = layer.held
        return decisions

    def _each(self, place: Place) -> list[float]:
        return tokens_each(self.budget, place.prompt, place.seen)

    def _shares(self, done: list[Found], place: Place) -> np.ndarray:
        """Tokens of each layer that is done (B, N), those that it keeps in any case included; real numbers."""
        each, layers = self._each(place), place.layers
        fixed = np.minimum(each, self.fixed)
        free = np.asarray(each) - fixed
        signals = [layer.signal.to(done[0].signal.device) for layer in done]  # layers may lie on several
        weights = self.weights(signals, torch.from_numpy(free), layers).cpu().numpy().astype(np.float64)
        held = np.stack([layer.held for layer in done], 1)
        rows = zip(weights, free * layers, held - fixed[:, None], strict=True)
        shares: np.ndarray = fixed[:, None] + np.stack([share_out(w, total, caps.clip(0)) for w, total, caps in rows])
        return shares


def _tokens(held: np.ndarray, like: Int[Tensor, "B H"]) -> Int[Tensor, "B H"]:
    """The same number for each head of a row."""
    return torch.from_numpy(held).to(like)[:, None].expand_as(like)
