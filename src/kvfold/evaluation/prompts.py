"""From a document and a question to the tokens of a prompt."""

from typing import Any

import torch
from torch import Tensor


def build_prompt(
    tokenizer: Any, document: str, question: str | None, *, chat: bool = True, limit: int | None = None
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (1, T): document, then question, in the model's chat template if it has one.

    `limit` tokens at most: the document is cut in its middle. Raises ValueError where not even the rest fits.
    """
    ids = _encode(tokenizer, document, question, chat)
    if limit is not None and len(ids) > limit:
        words = tokenizer(document, add_special_tokens=False).input_ids
        room = len(words) - (len(ids) - limit) - 8  # a few tokens of slack: text at the seam may tokenise anew
        if room < 2:
            raise ValueError(f"limit={limit} tokens leaves no room for the document; the question alone takes more")
        document = tokenizer.decode(words[: room - room // 2]) + tokenizer.decode(words[len(words) - room // 2 :])
        ids = _encode(tokenizer, document, question, chat)[:limit]
    return {
        "input_ids": torch.tensor([ids], dtype=torch.int64),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }


PIECE = 2**16
"""Characters that are counted at once: a tokenizer takes 200 bytes and more for each of a text."""


def count_up_to(tokenizer: Any, text: str, most: int) -> int:
    """Tokens of a text, or as many as its beginning has where that is more than `most`; a few off at each piece."""
    found = 0
    for start in range(0, len(text), PIECE):
        found += len(tokenizer(text[start : start + PIECE], add_special_tokens=False).input_ids)
        if found > most:
            break
    return found


def ends_of(tokenizer: Any, text: str, tokens: int) -> tuple[str, float]:
    """Beginning and end of a long text, each of more than `tokens` tokens, and how many tokens a character has there.

    Whoever keeps at most `tokens` of either gets the same from them as from the whole text.
    """
    size = 8 * tokens
    while 2 * size < len(text):
        counts = [count_up_to(tokenizer, part, len(part)) for part in (text[:size], text[-size:])]
        if min(counts) > tokens:
            return text[:size] + text[-size:], sum(counts) / (2 * size)
        size *= 2
    return text, count_up_to(tokenizer, text, len(text)) / len(text)


def _encode(tokenizer: Any, document: str, question: str | None, chat: bool) -> list[int]:
    if chat and getattr(tokenizer, "chat_template", None):
        text = document if question is None else f"{document}\n\nQuestion: {question}"
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(rendered, add_special_tokens=False).input_ids)
    text = document if question is None else f"{document}\n\nQuestion: {question}\nAnswer:"
    return list(tokenizer(text).input_ids)
