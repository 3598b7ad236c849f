"""Sizes in a model's configuration that no model has: building one would take all time or memory, weights or not."""

import os
from typing import Any

MOST = {
    "num_hidden_layers": 10_000, "num_attention_heads": 2**20, "num_key_value_heads": 2**20, "num_experts": 2**16,
    "num_local_experts": 2**16, "n_routed_experts": 2**16, "hidden_size": 2**31, "vocab_size": 2**31,
    "intermediate_size": 2**31, "head_dim": 2**31, "max_position_embeddings": 2**40, "sliding_window": 2**40,
}  # fmt: skip
"""More than any model has."""


def check_sizes(name: str | os.PathLike[str], config: Any) -> None:
    """Raise ValueError for a field that is negative, 0 or above `MOST`; what is no integer is the model's code's."""
    text = config.get_text_config(decoder=True)
    for field, most in MOST.items():
        value, least = getattr(text, field, None), 0 if "experts" in field else 1
        if isinstance(value, int) and not least <= value <= most:
            raise ValueError(f"model={os.fspath(name)!r}: {field}={value!r:.80} must be from {least} to {most}")
