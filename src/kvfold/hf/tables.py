"""Rotations whose angles depend on the length of what is read: dynamic NTK, longrope.

transformers keeps their angles in the model, works them out anew when a pass goes further than those before it, and so
has a later pass read with what an earlier one left. Another thread's pass, too: there is one table for all.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvfold.artefacts.fields import rotates_by_length, text_config
from kvfold.hf.anatomy import text_decoder

STATE = ("inv_freq", "max_seq_len_cached", "attention_scaling")
"""How attributes of a rotary embedding end that a pass may change."""
_turns: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
"""Whose turn it is to read with a decoder as if the text were longer."""
_giving = RLock()


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
    """This thread's passes within the block turn by the angles of a text of `tokens` positions, whatever they read.

    Other threads' passes are what they are without. Of threads that want such a block of one model, one waits for the
    other. RuntimeError for a pass whose angles are not those of the first: another thread has read a text of another
    length meanwhile, and set the model's table by that.
    """
    found, here, first = by_length(model), get_ident(), dict[Any, Tensor]()

    # without `kwargs`: torch forgets that a hook wants them where it is removed while another thread is about to call
    def lengthen(rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if get_ident() != here or kwargs is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _longer(kwargs["position_ids"], tokens)}
        return (args[0], _longer(args[1], tokens), *args[2:]), kwargs

    def shorten(rotary: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        if get_ident() != here:
            return None
        parts = output if isinstance(output, tuple) else (output,)
        last = torch.cat([part[..., -1, :].reshape(1, -1) for part in parts])  # the text's last position, in each pass
        kind = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
        if not _close(last, first.setdefault((rotary, kind), last)):
            raise RuntimeError(
                f"another thread read with this {type(model).__name__} while it read a prompt in chunks: its rotations "
                "turn by the length of what is read, and the model has one table of them. Read that prompt again"
            )
        return tuple(part[..., :-1, :] for part in output) if isinstance(output, tuple) else output[..., :-1, :]

    with _turn(model) if found else nullcontext(), ExitStack() as stack:
        for rotary in found:
            for handle in (
                rotary.register_forward_pre_hook(lengthen, with_kwargs=True),
                rotary.register_forward_hook(shorten, with_kwargs=True, prepend=True),  # of blocks the inner first
            ):
                stack.callback(handle.remove)
        yield


def _turn(model: Any) -> Any:
    with _giving:
        return _turns.setdefault(text_decoder(model), RLock())


def _close(one: Tensor, two: Tensor) -> bool:
    """Whether angles are the same, up to the last bits."""
    if one.shape != two.shape:
        return True  # rows that came or went
    return bool((one - two).abs().max() <= 4 * torch.finfo(one.dtype).eps * two.abs().max().clamp(min=1))


def _longer(positions: Tensor, tokens: int) -> Tensor:
    """Positions with the text's last one behind them: a rotary embedding looks at the highest."""
    return torch.cat([positions, torch.full_like(positions[..., :1], tokens - 1)], -1)
