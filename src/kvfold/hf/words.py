"""A model's tokenizer, and what stands for a user's words in its chat template."""

from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer

WORDS = "what a user says"


@lru_cache(maxsize=8)
def tokenizer_of(place: str) -> Any:
    """The tokenizer beside a model's weights, or None; nothing is fetched."""
    if not place:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError):
        return None
