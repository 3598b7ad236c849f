"""From an example to token ids: the chat template, the split behind the context, and cutting what is too long."""

from dataclasses import dataclass, replace
from typing import Any

from kvfold.evaluation.examples import Example, Query

_SEAM = "\ue000context ends\ue001"  # of the private-use area: no text has it


@dataclass(frozen=True)
class EncodedPrompt:
    """An example as token ids. `head` ends with the context; `tails[j]` is query j, its answer's beginning included.

    `whole[j]` are head and tail encoded as one text, which may differ from head + tail by a token at the seam.
    `turns[j]` (j > 0) is what follows the prompt so far in a conversation: the right answer to query j - 1, query j.
    `cut`: tokens of the context that were left out, because the window is too small.
    """

    head: list[int]
    tails: list[list[int]]
    whole: list[list[int]]
    turns: list[list[int]]
    cut: int = 0


class Prompter:
    """Encodes examples for one model. `window`: tokens of prompt and answer that it can take, template included.

    Raises ValueError for an example whose queries alone don't fit, and (from `prompt(turns=True)`) for a chat
    template that rewrites earlier turns.
    """

    def __init__(self, tokenizer: Any, window: int, chat: bool = True):
        self.tokenizer, self.window = tokenizer, window
        self.chat = chat and bool(getattr(tokenizer, "chat_template", None))

    def prompt(self, example: Example, *, turns: bool = False) -> EncodedPrompt:
        """Token ids of an example, its context cut where it is too long."""
        chat = self.chat and example.chat
        whole, example = example.context, self.fit(example, turns=turns)
        texts = [self._text(example.context, query, chat) for query in example.queries]
        head = texts[0].split(_SEAM)[0]
        tails = [text.split(_SEAM)[1] for text in texts]
        return EncodedPrompt(
            head=self._ids(head, first=not chat),
            tails=[self._ids(tail, first=False) for tail in tails],
            whole=[self._ids(head + tail, first=not chat) for tail in tails],
            turns=self._turns(example, chat) if turns else [],
            cut=0 if example.context is whole else len(self._ids(whole)) - len(self._ids(example.context)),
        )

    def fit(self, example: Example, *, turns: bool = False) -> Example:
        """The example with its context cut so that every query and its answer fit the window.

        "middle" keeps the first and last half of the prompt's tokens (LongBench), "end" the first of the context,
        with the separator that `info` may name (ZeroSCROLLS).
        """
        chat, query = self.chat and example.chat, max(example.queries, key=self._need)
        frame = len(self._ids(self._text("", replace(query, text=""), chat).replace(_SEAM, ""), first=not chat))
        limit = self.window - self._answer(query) - frame - 8  # decoding and encoding anew moves a few tokens
        if turns:  # every query with its right answer and its frame, not the longest alone
            golds = sum(len(self._ids(", ".join(each.answers))) for each in example.queries)
            limit -= golds + sum(self._need(each) + frame - self._answer(each) for each in example.queries[1:])
        context, asked = self._ids(example.context), self._ids(query.text)
        if len(context) + len(asked) <= limit + 8:
            return example
        separator = str(example.info.get("separator", "")) if example.cut == "end" else ""
        room = limit - len(asked) - len(self._ids(separator))
        front, back = (room, 0) if example.cut == "end" else (limit // 2, limit - limit // 2 - len(asked))
        if min(room, front) < 1 or back < 0:
            raise ValueError(
                f"example {example.id!r} has a query of {len(asked)} tokens and an answer of up to "
                f"{query.max_new_tokens}, which leaves no room for a context in a window of {self.window}"
            )
        kept = self._decode(context[:front]) + separator + (self._decode(context[-back:]) if back else "")
        return replace(example, context=kept)

    def _need(self, query: Query) -> int:
        return len(self._ids(query.text + query.prefix)) + self._answer(query)

    def _answer(self, query: Query) -> int:
        """Tokens that an answer may take."""
        return query.max_new_tokens if query.target is None else len(self._ids(query.target))

    def _text(self, context: str, query: Query, chat: bool) -> str:
        if not chat:
            return f"{context}{_SEAM}{query.text}{query.prefix}"
        return self._render([{"role": "user", "content": f"{context}{_SEAM}{query.text}"}]) + query.prefix

    def _turns(self, example: Example, chat: bool) -> list[list[int]]:
        first = example.queries[0]
        messages = [{"role": "user", "content": example.context + first.text}]
        said, found = (self._render(messages) + first.prefix if chat else ""), [list[int]()]
        for before, query in zip(example.queries, example.queries[1:], strict=False):
            gold = before.answers[0] if len(before.answers) == 1 else ", ".join(before.answers)
            if chat:
                answer = before.prefix + (" " if before.prefix and not before.prefix[-1].isspace() else "") + gold
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": query.text.lstrip()}]
                text = self._render(messages)
                if not text.startswith(said):
                    raise ValueError("protocol='turns': this model's chat template rewrites earlier turns")
                found.append(self._ids(text[len(said) :] + query.prefix, first=False))
                said = text + query.prefix
            else:
                found.append(self._ids(f" {gold}\n\n{query.text.lstrip()}{query.prefix}", first=False))
        return found

    def _render(self, messages: list[dict[str, str]]) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _ids(self, text: str, first: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=first).input_ids)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text
