"""What hooks, prompts and files know of a cache: its layers, what it has read, and the call of the model in hand."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvfold.hf import traced
from kvfold.hf.anatomy import attention_modules
from kvfold.hf.attention import attend
from kvfold.hf.beside import end_recording, leave_inference
from kvfold.hf.call.call import Call
from kvfold.hf.call.checking import Checked
from kvfold.hf.call.given import Given
from kvfold.hf.call.modes import Mode
from kvfold.hf.call.pending import Pending
from kvfold.hf.call.reading import Reading
from kvfold.hf.layers import PagedLayer, WindowLayer, mark_of
from kvfold.hf.windows import CodedWindow
from kvfold.layer.late import Done, carry_out
from kvfold.layer.plan import Plan
from kvfold.methods.base import Decisions
from kvfold.views import answered


class Host(Checked):
    """The part of a cache that one call of the model needs."""

    def __init__(self, layers: list[Any]):
        super().__init__(layers=layers)
        self.name, self._attentions = traced.name(self), dict[int, nn.Module]()
        self._begin()

    def _begin(self) -> None:
        """Nothing is read, and nothing waits."""
        self.mode, self.call, self.pending, self.reading, self.given = Mode(), Call(), Pending(), None, Given()
        self.paged = [layer.core for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def coded_windows(self) -> list[CodedWindow]:
        """The sliding windows that lie in a format."""
        return [layer for layer in self.layers if isinstance(layer, CodedWindow)]

    def _marks(self) -> tuple[Any, ...]:
        """How far the layers have read: another tuple as soon as one of them has read on."""
        return (self.rows.width, *(mark_of(layer) for layer in self.layers if not isinstance(layer, PagedLayer)))

    def for_model(self, model: Any) -> "Host":
        """An empty cache of a model, of this cache's kind, that keeps everything."""
        raise NotImplementedError

    def fork(self) -> "Host":
        """A second cache with the same content."""
        raise NotImplementedError

    def prompt_of(self, plan: Plan, group: int) -> Any:
        """The prompt of a pass that is over, as `Method.after_prompt` sees it."""
        raise NotImplementedError

    # -- forward passes --------------------------------------------------------------------------------------

    def enter(self, ordinal: int, tokens: int, rows: int) -> Plan:
        """A paged layer is about to attend: the pass it belongs to, a new one when the layers start over."""
        call = self.call
        if call.plan is None or ordinal <= call.at:
            self.settle_pending()
            call.plan = self._plan(tokens, rows)
        call.at = ordinal
        return call.plan

    def _plan(self, tokens: int, batch: int) -> Plan:
        call, mode, rows = self.call, self.mode, self.rows
        if call.marks is None:  # else the hook has asked, before any layer had read
            self.check_pass(tokens, batch)
        first = self.pending.opens()
        prefill, later = self.reads_prompt(tokens), self.pending.recording and rows.width > 0 and not first
        prompts = None
        if prefill and isinstance(mode.prefilling, tuple):
            prompts = np.isin(np.arange(rows.batch), mode.prefilling)
        return Plan(
            prefill=prefill and not later, turn=prefill and later, listen=mode.listening, prompts=prompts,
            defer=self.pending.recording, observe=mode.observe, token_ids=call.token_ids, mask=call.mask,
            images=call.images,
        )  # fmt: skip

    def leave(self, ordinal: int, plan: Plan) -> None:
        """A paged layer has stored its tokens: decisions about it and earlier ones, and after the last about all."""
        if plan.defer:
            self.pending.read(plan)
        elif plan.late:
            self._late_events(ordinal, plan)
        if self.spilled is not None:
            one_each = not (plan.prefill or plan.turn)  # a generated token for each row, whoever looks at it
            self.spilled.left(self.paged[ordinal], settle=not one_each)
            if one_each:
                self.spilled.fetch(self.paged[(ordinal + 1) % len(self.paged)])

    def expect(self, ordinal: int) -> None:
        """A paged layer is about to read what it has stored; the next one's is brought meanwhile."""
        if self.spilled is not None:
            self.spilled.expect(self.paged[(ordinal + 1) % len(self.paged)])

    def _late_events(self, ordinal: int, plan: Plan) -> None:
        if plan.prompts is not None:  # whose rows read a prompt was refused, see `check_pass`
            plan = replace(plan, prefill=False)
        for number, group in enumerate(self.rows.groups):
            method, done = group.method, Done(self.paged[: ordinal + 1], plan, number)
            if method.listens("after_layer"):
                self._carry_out(method.after_layer(done, ordinal), plan, number)
            if ordinal == len(self.paged) - 1 and method.listens("after_forward"):
                self._carry_out(method.after_forward(done), plan, number)

    def _carry_out(self, decisions: Mapping[int, Decisions], plan: Plan, group: int) -> None:
        for ordinal, made in decisions.items():
            carry_out(self.paged, ordinal, made, plan, group)
            if self.spilled is not None:
                self.spilled.left(self.paged[ordinal], settle=not plan.step)

    def finish(self, plan: Plan | None, greedy: Any) -> None:
        """A forward pass is over: `after_prompt`, unless assisted decoding is to take some of the prompt back.

        `greedy`: from the pass to what the model says next, see `Plan.greedy`.
        """
        if plan is None or not (plan.prefill or plan.turn) or not plan.listen or not self.rows.listens("after_prompt"):
            return
        plan.greedy, self.pending.unheard = greedy(plan), plan
        if not plan.defer:
            self._hear()

    def _hear(self) -> None:
        plan, self.pending.unheard = self.pending.unheard, None
        if plan is None or not plan.prefill:  # a draft, which was cropped
            return
        for number, group in enumerate(self.rows.groups):
            if group.method.listens("after_prompt"):
                prompt = self.prompt_of(plan, number)
                self._carry_out(answered(group.method.after_prompt(prompt), prompt), plan, number)

    def settle_pending(self) -> None:
        """Run the events that still wait for a crop: assisted decoding is over, what came last was a further turn."""
        if self.pending.waits:
            self.stop_recording()

    def stop_recording(self) -> None:
        """Assisted decoding is over: no crop comes any more."""
        if self.pending.recording:
            for layer in self.layers:
                end_recording(layer)
        self.settled(self.pending.turn(self.paged))

    def settled(self, plan: Plan | None) -> None:
        """The late events of layers whose own have come, then `after_prompt`."""
        if plan is not None and plan.listen:
            for core in self.paged:
                self._late_events(core.ordinal, plan)
        self._hear()

    # -- calls of the model ----------------------------------------------------------------------------------

    def forgive(self) -> None:
        """Forget a call that failed before any layer had stored its tokens.

        Raises RuntimeError where some layers hold tokens of a call that failed: what they dropped for them is gone.
        """
        if self.call.marks is None:
            return
        if self._marks() != self.call.marks:
            raise RuntimeError(
                "the last call of the model with this cache failed when layers had already stored its tokens: "
                "call cache.reset() and read the text again"
            )
        self.call = Call()

    def begin_call(self, after: Reading | None, ids: Tensor | None = None) -> None:
        """The caller's own call of the model begins; `ids`: what it was given."""
        if not torch.is_inference_mode_enabled():
            for layer in self.layers:
                if not isinstance(layer, PagedLayer):
                    leave_inference(layer)
        self.call = Call(self._marks(), after, ids)

    @contextmanager
    def ending(self) -> Iterator[Call]:
        """Within the block the call is over and its tokens count, unless the block fails, which does what is left."""
        call, self.call = self.call, Call()
        if call.marks is not None:
            self.reading, self.given = call.after, self.given.more(call.ids)
        try:
            yield call
        except BaseException:
            self.call = call
            raise

    # -- compiled forwards -----------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' own; in a graph that is being made the keys carry the names of cache and layer."""
        if torch.compiler.is_compiling() and traced.passes(self.layers[layer_idx], key_states, value_states):
            setattr(key_states, traced.MARK, (self.name, layer_idx))
            return key_states, value_states
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """What the attention of model layer `layer` gives when a graph runs, (B, Q, Hq, Dv)."""
        if q.shape[2] > 1 or self.mode.observe is not None or self.pending.recording:
            q, k, v = q.clone(), k.clone(), v.clone()  # who looks may keep them, and the graph reuses their memory
        if not self._attentions:
            self._attentions = attention_modules(self.model)
        keys, values = self.layers[layer].update(k, v)
        return attend(self.layers[layer], self._attentions[layer], q, keys, values, mask, scale)

    def window(self, index: int) -> WindowLayer | None:
        """Model layer `index`, if it is a sliding window of ours."""
        layer = self.layers[index]
        return layer if isinstance(layer, WindowLayer) else None
