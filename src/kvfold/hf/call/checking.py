"""What can't be, said before any layer has read: a pass for which a method, a format or an arena is not made."""

from typing import Any

import numpy as np

from kvfold.hf.call.modes import Modal
from kvfold.hf.recurrence import carries_state, is_recurrent
from kvfold.hf.source import NAME
from kvfold.layer.rows import check_most
from kvfold.methods.base import Method


def check_reads_on(method: Method) -> None:
    """ValueError where a method would drop, after a further prompt, tokens that their format can't drop alone."""
    form = method.format
    firm = form is not None and form.traits.addressed != "token" and not form.traits.requantises
    if firm and method.listens("after_prefill"):
        raise ValueError(
            f"method={method} would drop single tokens of an earlier prompt from {form}, which holds them by the page: "
            "give the format requantise=True, or read the text as one prompt"
        )


def check_carried(model: Any) -> None:
    """ValueError where a pass of several tokens would start from empty recurrent states, not from those read so far."""
    if not carries_state(model):
        raise ValueError(
            f"{type(model).__name__} forgets its recurrent states when it reads several tokens behind others, with "
            "transformers' own cache too: read its text as one prompt, without prefill_chunk; what follows token by "
            "token is right"
        )


class Checked(Modal):
    """A cache that looks at a pass before it comes, and behind it whether its keys were read."""

    def reads_prompt(self, tokens: int) -> bool:
        """Whether a pass over so many tokens would count as a prompt, not as generated ones."""
        return tokens > 1 or self.rows.width == 0 or bool(self.mode.prefilling)

    def check_pass(self, tokens: int, rows: int) -> None:
        """Raise, before any layer has read, where a pass over so many tokens of so many rows can't be.

        ValueError where there are more rows than `memory` was given for, where a method would drop tokens that their
        format can't drop alone, or reads prompts in its own way beside rows of others, or where the model would forget
        its recurrent states; OutOfPages where an arena has no room for a generated token in every layer. (What a prompt
        leaves of its tokens is known when they were read.)
        """
        check_most(self.rows, rows)
        if tokens > 1 and any(map(is_recurrent, self.layers)):
            check_carried(self.model)
        if not self.rows.width:
            return
        if not self.reads_prompt(tokens):
            self._check_room()
        elif self.mode.listening and (self.pending.opening or not self.pending.recording):
            self._check_further_prompt()

    def check_words(self, ids: Any) -> None:
        """Raise ValueError, before any layer has read, where a method must know the tokens of a pass without ids."""
        named = [group.method for group in self.rows.groups if group.method.listens("label")]
        if ids is None and named:
            raise ValueError(f"method={named[0]} must know the tokens of a text: give input_ids")

    def _check_room(self) -> None:
        if self.arena is None:
            return
        wanted: dict[Any, int] = {}
        for core in self.paged:
            stored, heads = core.stored, core.stored.spec.heads
            for number in np.unique(stored.opened):
                more = np.repeat((stored.opened == number).astype(np.int32)[:, None], heads, 1)
                for pool, pages in stored.segments[number][1].pages_for(more).items():
                    wanted[pool] = wanted.get(pool, 0) + pages
        self.arena.check(wanted)

    def _check_further_prompt(self) -> None:
        reading, mixed = self.mode.prefilling, isinstance(self.mode.prefilling, tuple)
        if mixed and len(self.paged) < len(self.layers):
            raise ValueError(
                f"prefilling(rows={reading}): {type(self.model).__name__} has windows or recurrent states, which take "
                "padding before a generated token for text: read the prompt in a cache of its own, and join that"
            )
        for group in self.rows.groups:
            rows = range(self.rows.batch) if group.rows is None else group.rows.tolist()
            if isinstance(reading, tuple) and not set(rows) & set(reading):
                continue
            check_reads_on(group.method)
            alone = group.method.own_prefill or group.method.listens("after_prompt")
            late = group.method.listens("after_layer") or group.method.listens("after_forward")
            if (len(self.rows.groups) > 1 and alone) or (mixed and (alone or late)):
                raise ValueError(
                    f"method={group.method} reads a prompt in its own way, which it can't beside rows that read "
                    "something else: read it in a cache of its own, and join that"
                )

    def check_consumed(self) -> None:
        """Raise RuntimeError if a layer got keys that no attention function has seen."""
        layer, self.call.unread = self.call.unread, None
        if layer is not None:
            name = self.model.config.get_text_config(decoder=True)._attn_implementation
            if name != NAME:
                raise RuntimeError(
                    f"the attention of {type(self.model).__name__} was set to {name!r} when it had a kvfold cache: "
                    f"set_attn_implementation({NAME!r}) sets it back, and computes what 'sdpa' does where there is no "
                    "such cache"
                )
            raise RuntimeError(
                f"layer {layer.core.layer} of {type(self.model).__name__} updated the cache, but its attention did "
                'not call the function registered as "kvfold" with the keys that it got: it ignores '
                "transformers' AttentionInterface, changes the keys first, or is part of another model than the one "
                "that the cache was made for"
            )

    @property
    def method(self) -> Method:
        """The method that decides. Raises ValueError where rows have different ones."""
        return self.rows.method

    @property
    def method_text(self) -> str:
        """The methods of all rows, as text."""
        return ", ".join(str(group.method) for group in self.rows.groups)
