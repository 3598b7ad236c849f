"""What a method's late events see, the layers that a pass has done with, and how their decisions are carried out."""

from collections.abc import Sequence
from typing import Any

from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Pass
from kvfold.layer.sharing import share
from kvfold.methods.base import Decisions, decided
from kvfold.views import LayerView
from kvfold.views.decisions import Share


class Done:
    """The layers that a forward pass has done with, as a method's late events see them."""

    def __init__(self, layers: list[KVLayer], this: Pass):
        self._layers, self._this = layers, this

    @property
    def prefill(self) -> bool:
        """Whether the pass read a prompt."""
        return self._this.prefill

    @property
    def step(self) -> dict[str, Any]:
        """The context that the layers of this pass share."""
        return self._this.step

    def __getitem__(self, ordinal: int) -> LayerView:
        return self._layers[ordinal].view(self._this)

    def __len__(self) -> int:
        return len(self._layers)


def carry_out(layers: Sequence[KVLayer], ordinal: int, decisions: Decisions, this: Pass) -> None:
    """What a late event decided about one layer; then what it decided about that layer and another one."""
    made, core, prompt = decided(decisions), layers[ordinal], this.before if this.prefill else None
    alone = [decision for decision in made if not isinstance(decision, Share)]
    if alone:
        core.decide(alone, this)
    for decision in made:
        if isinstance(decision, Share) and core.alike(layers[decision.other]):
            share(layers[decision.other].stored, core.stored, decision, core.seen, prompt)
