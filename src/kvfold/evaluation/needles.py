"""A needle in a haystack of real text: a 7-digit number planted at a depth, asked for at the end."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.evaluation.decoding import decode
from kvfold.hf.cache import Cache
from kvfold.hf.fanout import prefill_many

NEEDLE = "\nThe secret number is {}. Remember it.\n"
QUESTION = "What is the secret number?"
LEAD = "The secret number is"
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Haystack:
    """A prompt (1, T) with a number planted in it."""

    ids: Tensor
    number: str
    depth: float


def plant(tokenizer: Any, text: str, tokens: int, depth: float, seed: int = 0) -> Haystack:
    """The first `tokens` tokens of `text` with the needle at `depth` (0 to 1), then the question.

    A chat model is asked in its template, a base model in plain text; both have their answer begun. Raises
    ValueError for a text that is too short or a depth outside 0 to 1.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth={depth!r} must be in [0, 1]")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) < tokens:
        raise ValueError(f"text has {len(ids)} tokens; tokens={tokens} must not be more")
    number = str(random.Random(f"{seed}:{depth}").randint(1_000_000, 9_999_999))
    cut = int(tokens * depth)
    body = tokenizer.decode(ids[:cut]) + NEEDLE.format(number) + tokenizer.decode(ids[cut:tokens])
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": f"{body}\n\n{QUESTION}"}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + LEAD
        found = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        found = tokenizer(f"{body}\nQuestion: {QUESTION}\nAnswer: {LEAD}", return_tensors="pt").input_ids
    return Haystack(found, number, depth)


@torch.no_grad()
def find(
    model: PreTrainedModel, tokenizer: Any, haystack: Haystack, caches: Sequence[Cache], new: int = 12
) -> list[bool]:
    """Whether each of the (empty) caches finds the number, greedily; one exact prefill serves them all."""
    ids = haystack.ids.to(model.device)
    first = prefill_many(model, {"input_ids": ids}, caches, logits_to_keep=1)[0, -1].float()
    answers = [tokenizer.decode(decode(model, cache, first, new).tokens) for cache in caches]
    return [haystack.number in answer for answer in answers]
