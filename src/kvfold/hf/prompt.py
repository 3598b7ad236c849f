"""A prompt that can be read again, as `Method.after_prompt` sees it."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.hf.anatomy import text_decoder
from kvfold.hf.argument import with_cache
from kvfold.hf.call.host import Host
from kvfold.hf.call.splitting import part_for
from kvfold.hf.draft import drafter, look_ahead
from kvfold.hf.greedy import go_on
from kvfold.hf.words import WORDS, tokenizer_of
from kvfold.layer.late import Done
from kvfold.layer.plan import Plan
from kvfold.views import LayerView


class Prompt(Done):
    """A prompt that every layer has stored, as `Method.after_prompt` sees it.

    Raises ValueError where the model was called without the prompt's ids.
    """

    def __init__(self, cache: Host, plan: Plan, group: int = 0):
        super().__init__(cache.paged, plan, group)
        if plan.token_ids is None:
            raise ValueError(f"method={cache.method} reads a prompt again: call the model with input_ids")
        self.cache, self.ids = cache, plan.token_ids

    @property
    def valid(self) -> Bool[Tensor, "B Q"]:
        """Which of them are not padding."""
        return self._mask()[:, -self.ids.shape[1] :]

    def _mask(self) -> Bool[Tensor, "B W"]:
        """Which of all columns read so far are not padding."""
        if self.plan.mask is not None:
            return self.plan.mask.bool().to(self.ids.device)
        return torch.ones(len(self.ids), self.cache.rows.width, dtype=torch.bool, device=self.ids.device)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; none where the model's folder has no tokenizer."""
        found = tokenizer_of(self.cache.model.name_or_path)
        return [] if found is None else list(found(text, add_special_tokens=False).input_ids)

    def answer(self) -> list[int]:
        """What the model's chat template puts between a user's words and the answer, as tokens."""
        found = tokenizer_of(self.cache.model.name_or_path)
        if found is None or not found.chat_template:
            return []
        turn = [{"role": "user", "content": WORDS}]
        rendered: str = found.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.encode(rendered.rpartition(WORDS)[2])

    @torch.no_grad()
    def read(self, ids: Int[Tensor, "B N"], valid: Bool[Tensor, "B N"], observe: Callable[[LayerView], None]) -> None:
        """Run `ids` through the model as if they came next; `observe` gets every layer's view, then they are gone."""
        cache = self.cache
        seen, mask = torch.from_numpy(cache.rows.seen).to(ids.device)[:, None], torch.cat([self._mask(), valid], 1)
        # The body may have no hooks that tell the cache of the padding.
        with cache.aside(observe), cache.prefilling():
            call = cache.call
            call.mask, call.part, call.asked = mask, part_for(cache, ids.shape[1], {}), True
            decoder = text_decoder(cache.model)
            decoder(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=(seen + valid.cumsum(1) - 1).clamp(min=0),
                **with_cache(decoder, cache),
                use_cache=True,
            )

    @torch.no_grad()
    def look_ahead(self, count: int, draft: str | None = None) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """At most `count` tokens that come next, greedily, and which of them count: each row ends with its end token.

        Said by the model itself, which goes on from all that is stored, without a trace; or by the model `draft` (a
        name or folder), which reads the tokens of this pass anew. Raises ValueError for one of another vocabulary.
        """
        cache, device = self.cache, self.ids.device
        reads = self.valid.any(1, keepdim=True)  # a row may bring nothing
        if draft is not None:
            ids, valid = look_ahead(cache.for_model(drafter(draft, cache.model)), self.ids, self.valid, count)
            return ids.to(device), valid.to(device) & reads
        first = self._next()
        with cache.aside():
            ids, valid = go_on(cache.model, cache, first, self._mask(), count)
        return ids, valid & reads

    def _next(self) -> Int[Tensor, "B 1"]:
        """What the model says after each row's last token: as the pass left it, else read again."""
        size, greedy, valid = self.ids.shape[1], self.plan.greedy, self.valid
        last = (valid * torch.arange(1, size + 1, device=valid.device)).argmax(1, keepdim=True)
        if greedy is not None:
            end = greedy.shape[1] - 1
            # A row's last token stands in the last of the columns that go on; a row that brings nothing says nothing.
            ends_there = ~valid.any(1, keepdim=True) if self.plan.narrow is None else torch.ones_like(valid[:, :1])
            at = torch.where(ends_there, end, last + end + 1 - size)
            if bool((at >= 0).all()):
                return greedy.to(at.device).gather(1, at)
        return self._again(last)

    def _again(self, last: Int[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
        """What the model says when it reads each row's last token once more, which stands in these columns."""
        cache = self.cache
        if len(cache.paged) < len(cache.layers) or any((c.counts() < c.seen[:, None]).any() for c in cache.paged):
            raise ValueError(
                f"method={cache.method} looks ahead: call a model with a head, whose output has the logits of every "
                "row's last token (logits_to_keep=0 for padding behind it)"
            )
        fork = cache.fork()
        seen = torch.from_numpy(cache.rows.seen).to(last.device)[:, None]
        mask = torch.cat([self._mask()[:, 1:], torch.ones_like(last, dtype=torch.bool)], 1)
        with fork.undecided():
            fork.crop(-1)
            given = {"attention_mask": mask.long(), "position_ids": (seen - 1).clamp(min=0)}
            out = cache.model(input_ids=self.ids.gather(1, last), **with_cache(cache.model, fork), **given)
        found: Tensor = out.logits[:, -1:].argmax(-1)
        return found
