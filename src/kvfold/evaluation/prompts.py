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


def _encode(tokenizer: Any, document: str, question: str | None, chat: bool) -> list[int]:
    if chat and getattr(tokenizer, "chat_template", None):
        text = document if question is None else f"{document}\n\nQuestion: {question}"
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(rendered, add_special_tokens=False).input_ids)
    text = document if question is None else f"{document}\n\nQuestion: {question}\nAnswer:"
    return list(tokenizer(text).input_ids)
