"""Tiny models with a tokenizer in folders of their own, as drafts of one another."""

from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from models import VOCAB, build


def drafter_folder(folder: Path, *, seed: int = 1, name: str = "llama", prefix: str = "w") -> str:
    """A model whose token i is the word `prefix` + i; other prefixes are other vocabularies."""
    model = build(name, seed=seed)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"{prefix}{i}": i for i in range(VOCAB)}, unk_token=f"{prefix}0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"{prefix}0").save_pretrained(folder)
    return str(folder)
