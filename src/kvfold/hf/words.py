"""A model's tokenizer, what its tokens say, and what stands for a user's words in its chat template."""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import AutoTokenizer

from kvfold.methods.base import Method

WORDS = "what a user says"
ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f", "\u2026")  # the last four: Chinese and Japanese ones, an ellipsis
"""What ends a sentence, where a token's text ends with it, closing quotes, brackets and blanks left aside."""
CLOSING = "\"'\u201d\u2019\u00bb)]\u3011\uff09\u300d \n"


@lru_cache(maxsize=8)
def tokenizer_of(place: str) -> Any:
    """The tokenizer beside a model's weights, or None; nothing is fetched."""
    if not place:
        return None

    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=8)
def sentence_ends(place: str) -> Bool[Tensor, " V"] | None:
    """Of each token whether a sentence ends with it (or with an empty line); None where no tokenizer is at `place`."""
    tokenizer = tokenizer_of(place)
    if tokenizer is None:
        return None
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    ends = [text.endswith("\n\n") or text.rstrip(CLOSING).endswith(ENDS) for text in texts]
    return torch.tensor(ends, dtype=torch.bool)


def check_words(model: Any, method: Method) -> None:
    """Raise ValueError where a method must know where sentences end and no tokenizer says so."""
    if "sentence_ends" in method.asks and sentence_ends(model.name_or_path) is None:
        raise ValueError(
            f"method={method} must know which tokens end a sentence, and no tokenizer is beside the weights of "
            f"{type(model).__name__} (name_or_path={model.name_or_path!r}): give marks=, the ids of such tokens"
        )
