"""Rotations whose angles depend on the length of what is read: dynamic NTK, longrope.

transformers keeps their angles in the model, works them out anew when a pass goes further than those before it, and so
has a later pass read with what an earlier one left.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.artefacts.fields import rotates_by_length, text_config
from kvfold.hf.anatomy import text_decoder

STATE = ("inv_freq", "max_seq_len_cached", "attention_scaling")
"""How attributes of a rotary embedding end that a pass may change."""


def rotaries(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model's text decoder."""
    return [m for m in text_decoder(model).modules() if type(m).__name__.endswith("RotaryEmbedding")]


def by_length(model: Any) -> list[nn.Module]:
    """Those whose angles depend on how long the text is."""
    return rotaries(model) if rotates_by_length(text_config(model)) else []


@contextmanager
def kept_tables(model: Any) -> Iterator[None]:
    """Passes within the block leave no trace in the model's rotations."""
    before = [(rotary, name, *found) for rotary in by_length(model) for name, found in _state(rotary).items()]
    try:
        yield
    finally:
        for rotary, name, value, was in before:
            if isinstance(value, Tensor) and not torch.equal(value, was):
                value.copy_(was)  # in place, as captured graphs need it
            setattr(rotary, name, value)


def _state(rotary: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a pass may change, with a copy: angles (written over, or others put there), lengths, scalings."""
    found = {**vars(rotary), **dict(rotary.named_buffers(recurse=False))}
    return {
        name: (value, value.clone() if isinstance(value, Tensor) else value)
        for name, value in found.items()
        if name.endswith(STATE)
    }


@contextmanager
def as_long_as(model: Any, tokens: int) -> Iterator[None]:
    """Passes within the block turn by the angles of a text of `tokens` positions, whatever part of it they read."""

    def lengthen(rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _longer(kwargs["position_ids"], tokens)}
        return (args[0], _longer(args[1], tokens), *args[2:]), kwargs

    def shorten(rotary: nn.Module, args: Any, output: Any) -> Any:
        return tuple(part[..., :-1, :] for part in output) if isinstance(output, tuple) else output[..., :-1, :]

    with ExitStack() as stack:
        for rotary in by_length(model):
            for handle in (
                rotary.register_forward_pre_hook(lengthen, with_kwargs=True),
                rotary.register_forward_hook(shorten),
            ):
                stack.callback(handle.remove)
        yield


def _longer(positions: Tensor, tokens: int) -> Tensor:
    """Positions with the text's last one behind them: a rotary embedding looks at the highest."""
    return torch.cat([positions, torch.full_like(positions[..., :1], tokens - 1)], -1)
