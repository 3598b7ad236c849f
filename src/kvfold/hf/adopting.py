"""How one exact pass over a prompt fills many caches, and what a method sees of a prompt that is over."""

from typing import Any

from torch import Tensor

from kvfold.hf.batch import Batch
from kvfold.hf.prompt import Prompt
from kvfold.layer.plan import Plan
from kvfold.views import LayerView


class Adopting(Batch):
    """The part of a cache that `prefill_many`, hooks and methods that read on know; nothing that a user calls."""

    def for_model(self, model: Any) -> "Adopting":
        made: Adopting = type(self)(model, "full", part_size=self.part_size)  # type: ignore[call-arg]  # of a `Cache`
        return made

    def prompt_of(self, plan: Plan, group: int) -> Prompt:
        return Prompt(self, plan, group)

    @property
    def shares_prefill(self) -> bool:
        """Whether `adopt` may fill this cache from another's pass: it reads prompts at once, and as they are, and its
        windows are the model's own."""
        return self.prefill_chunk is None and not self.method.own_prefill and not self.coded_windows

    def adopt(self, view: LayerView, *, wait: bool = False) -> None:
        """Fill one layer of this empty cache from another cache's view of its first pass. See `prefill_many`.

        `wait`: `after_prompt` waits for `end_adoption`, which knows what the model says next.
        """
        if self.method.own_prefill:
            raise ValueError(f"method={self.method} reads a prompt in its own way: it can't adopt another's prefill")
        core, call = self.paged[view.place.ordinal], self.call
        if core.ordinal == 0 or call.plan is None:
            call.plan = Plan(
                prefill=True, mask=view.queries.valid, token_ids=view.place.token_ids, images=view.place.images
            )
        plan, call.at = call.plan, core.ordinal
        core.adopt(view, plan)
        self.layers[core.layer].is_initialized = True
        self.leave(core.ordinal, plan)
        if core.ordinal == len(self.paged) - 1:
            call.plan = None
            if self.method.listens("after_prompt"):
                self.pending.unheard = plan
                if not wait and len(self.paged) == len(self.layers):  # else when windows are there: `settle_pending`
                    self.settled(None)

    def end_adoption(self, greedy: Tensor | None) -> None:
        """The prompt that a cache adopted is over, its windows are there: what a method does with all of it.

        `greedy` (B, K): what the model says after the last K columns.
        """
        if self.pending.unheard is not None:
            self.pending.unheard.greedy = greedy
        self.settle_pending()
