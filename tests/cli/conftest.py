"""A tiny model with a tokenizer, saved as a folder, for the command line."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

from models import build


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 97 tokens: the printable ASCII characters, one token each."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    build("llama").save_pretrained(path)
    characters = ["<pad>", "<bos>", "\u0120", *map(chr, range(33, 127))]
    core = Tokenizer(WordLevel({character: i for i, character in enumerate(characters)}, unk_token="?"))
    core.pre_tokenizer = Sequence([ByteLevel(add_prefix_space=False, use_regex=False), Split("", "isolated")])
    core.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>").save_pretrained(path)
    return path


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """About 200 tokens of text."""
    path = tmp_path / "document.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 4 + "A page holds sixteen tokens.")
    return path
