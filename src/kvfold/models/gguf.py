"""GGUF file to float32 safetensors: weights as transformers dequantises them, what it misses put right."""

import os
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's value types as struct has them; 8 is a string and 9 an array."""

LONGEST = 2**28
"""Bytes of a string: what a longer one claims is not asked for."""

DIGITS_FIRST = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
"""GGUF's names of the pre-tokenizers that cut out every digit and then split as GPT-2's does."""


def convert(path: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Write the GGUF file's model and tokenizer into `folder`, as `from_pretrained` reads them.

    Raises ValueError if the file lacks weights of its model, is damaged, or of a kind that transformers can't read.
    """
    try:
        _convert(path, folder, say)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the readers of transformers and gguf take a file's word for what it holds
        if isinstance(error, ValueError) and path.name in str(error):
            raise
        raise ValueError(f"{path.name} can't be converted: {type(error).__name__}: {error}") from error


def _convert(path: Path, folder: Path, say: Callable[[str], None]) -> None:
    metadata = header(path)
    say("converting the tokenizer")
    with silent():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    mend_tokenizer(tokenizer, metadata)
    tokenizer.save_pretrained(folder)
    say("converting the weights")
    # Newer versions can keep the weights packed, and would; older ones only know how to unpack them.
    packed = hasattr(transformers, "GgufConfig")
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    with silent():
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **options
        )
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise ValueError(f"{path.name} lacks weights of its model: {', '.join(sorted(info['missing_keys'])[:4])}")
    if wrong := info.get("mismatched_keys"):  # the same
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in wrong)
        raise ValueError(f"{path.name} has weights of another size than its model: {', '.join(names[:4])}")
    if getattr(model, "hf_quantizer", None) is not None:  # the weights are plain by now, but it forbids saving
        model.hf_quantizer.remove_quantization_config(model)
    mend_config(model.config, metadata)
    say("saving")
    with silent():
        model.save_pretrained(folder)


def header(path: Path) -> dict[str, Any]:
    """A GGUF file's metadata, arrays by their length, and the names of its tensors under "tensors".

    gguf.GGUFReader takes 14 seconds over Gemma's vocabulary, this skips it. Raises ValueError for a file that
    is not GGUF, ends too early, or says of itself what can't be.
    """
    try:
        with path.open("rb") as file:
            magic, version = file.read(4), number(file, "I")
            if magic != b"GGUF" or not 2 <= version < 1 << 16:  # a big-endian file's version is huge
                raise ValueError(f"{path} is not a little-endian GGUF file of version 2 or later")
            tensors, keys = number(file, "Q"), number(file, "Q")
            metadata = {string(file): entry(file, number(file, "I")) for _ in range(keys)}
            names = []
            for _ in range(tensors):
                names.append(string(file))
                skip(file, 8 * number(file, "I") + 12)  # its shape, then type and offset
    except (struct.error, EOFError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    return metadata | {"tensors": names}


def number(file: BinaryIO, kind: str) -> Any:
    """The next number of the file."""
    return struct.unpack("<" + kind, file.read(struct.calcsize(kind)))[0]


def string(file: BinaryIO) -> str:
    """The next string of the file."""
    size = number(file, "Q")
    data = file.read(size) if size <= LONGEST else b""
    if len(data) < size:
        raise EOFError(f"it ends within a string of {size} bytes")
    return data.decode("utf-8", errors="replace")


def skip(file: BinaryIO, size: int) -> None:
    """Pass over so many bytes of the file."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    if size > left:
        raise EOFError(f"it has {left} bytes where {size} are to come")
    file.seek(size, 1)


def entry(file: BinaryIO, kind: int) -> Any:
    """The next value of the file; of an array only its length."""
    if kind in SCALARS:
        return number(file, SCALARS[kind])
    if kind == 8:
        return string(file)
    if kind != 9:
        raise ValueError(f"{file.name} holds a value of type {kind}, which GGUF does not have")
    inner, length = number(file, "I"), number(file, "Q")
    if inner in SCALARS:
        skip(file, length * struct.calcsize(SCALARS[inner]))
    else:
        for _ in range(length):
            entry(file, inner)
    return length


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]) -> None:
    """Split digits off where the file says so.

    transformers 5.23 does not know this family and takes plain GPT-2, which cuts "\\n\\n1" into three tokens
    where the model was trained on two.
    """
    if metadata.get("tokenizer.ggml.model") == "gpt2" and metadata.get("tokenizer.ggml.pre") in DIGITS_FIRST:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )


def mend_config(config: PretrainedConfig, metadata: dict[str, Any]) -> None:
    """Set what transformers leaves to its defaults, and warn of what it drops.

    Gemma 3's GGUF says neither its layer pattern nor its local RoPE base nor its attention scale: llama.cpp
    has them in code, transformers in class defaults that are one checkpoint's values.
    """
    architecture = metadata["general.architecture"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if architecture == "gemma3":
        every = metadata.get("gemma3.attention.sliding_window_pattern", 6)
        config.layer_types = [
            "sliding_attention" if (n + 1) % every else "full_attention" for n in range(config.num_hidden_layers)
        ]
        stretch = {"rope_type": "default"}
        if scaling == "linear":  # of the global layers only
            stretch = {"rope_type": "linear", "factor": metadata["gemma3.rope.scaling.factor"]}
        theta, local = metadata["gemma3.rope.freq_base"], metadata.get("gemma3.rope.freq_base_swa", 10_000.0)
        config.rope_parameters = {
            "full_attention": {**stretch, "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
        is_27b = config.num_hidden_layers == 62  # the only size whose scale is not its head's
        heads = config.num_attention_heads
        config.query_pre_attn_scalar = config.hidden_size // heads if is_27b else config.head_dim
    elif "rope_freqs.weight" in metadata["tensors"] or (scaling != "none" and architecture != "gpt-oss"):
        warnings.warn(
            f"this GGUF file scales its rotary positions ({scaling}), which transformers does not read: the "
            "converted model may be wrong, above all on long texts",
            stacklevel=2,
        )


BAR = re.compile(r"\r?[^\r\n]*?\d+%\|[^|\r\n]*\| *\d+/\d+ *\[[^\]\r\n]*\] *\n?")
"""One state of a tqdm bar, as in `Loading: 40%|####      | 4/10 [00:01<00:02, 3.00it/s]`."""


@contextmanager
def silent() -> Iterator[None]:
    """Hide the progress bars of transformers on stderr, and nothing else that is written there.

    Its GGUF reader has a bar that no switch turns off, so stderr is held back and given without them.
    """
    held, showing = StringIO(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(held):
            yield
    finally:
        if showing:
            logging.enable_progress_bar()
        sys.stderr.write(BAR.sub("", held.getvalue()))
