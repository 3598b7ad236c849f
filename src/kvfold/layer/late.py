"""What a method's late events see, the layers that a pass has done with, and how their decisions are carried out."""

from collections.abc import Sequence
from typing import Any

from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.sharing import share
from kvfold.methods.base import Decisions, decided
from kvfold.views import LayerView
from kvfold.views.decisions import Share


class Done:
    """The layers that a forward pass has done with, as the late events of a group's method see them."""

    def __init__(self, layers: Sequence[KVLayer], plan: Plan, group: int = 0):
        self.layers, self.plan, self.group = layers, plan, group

    @property
    def prefill(self) -> bool:
        """Whether the pass read a prompt."""
        return self.plan.prefill

    @property
    def step(self) -> dict[str, Any]:
        """The context that the layers of this pass share."""
        return self.plan.shared(self.group)

    def __getitem__(self, ordinal: int) -> LayerView:
        moment = self.layers[ordinal].moment(self.plan)
        return moment.of_group(moment.without_queries(), self.group, moment.rows.groups[self.group].rows)

    def __len__(self) -> int:
        return len(self.layers)


def carry_out(layers: Sequence[KVLayer], ordinal: int, decisions: Decisions, plan: Plan, group: int = 0) -> None:
    """What a late event decided about one layer; then what it decided about that layer and another one."""
    made, core, prompt = decided(decisions), layers[ordinal], plan.before if plan.prefill else None
    alone = [decision for decision in made if not isinstance(decision, Share)]
    if alone:
        core.moment(plan).carry_out(alone, group)
    for decision in made:
        if isinstance(decision, Share) and core.alike(layers[decision.other]):
            share(layers[decision.other].stored, core.stored, decision, core.seen, prompt)
