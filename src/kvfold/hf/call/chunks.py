"""Reading a long prompt in chunks, from inside one call of the model: `Cache(..., prefill_chunk=512)`.

A forward pre-hook runs the model over all chunks but the last, and lets the call go on with that one. After each chunk
the method decides, so that a layer never holds more than its budget and a chunk, however long the prompt is.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kvfold.hf.call.images import pixels_in
from kvfold.hf.tables import as_long_as, by_length

WHOLE = ("output_attentions", "output_hidden_states", "output_router_logits", "labels")
"""What would need the whole prompt's states at once."""


def chunk_ends(length: int, chunk: int) -> list[int]:
    """Where the chunks of a prompt end; the last is never a lone token, which would count as a generated one."""
    ends = [*range(chunk, length, chunk), length]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        ends[-2] -= 1
    return ends


def read_ahead(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chunk: int, read: int
) -> tuple[dict[str, Any], list[Tensor]] | None:
    """Run all chunks but the last; the arguments of the last, and the outputs of the others if all are wanted.

    `read`: columns of text before them. All chunks turn by the angles of the whole, as one pass would.
    None where there is nothing to split. Raises ValueError for arguments that would need the whole prompt at once.
    """
    named = dict(kwargs)
    if args:
        named["input_ids"] = args[0]
    tokens = named.get("input_ids")
    tokens = named.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.shape[1] <= chunk:
        return None
    if len(args) > 1:
        raise ValueError(f"prefill_chunk={chunk} needs the model's arguments by name, but {len(args)} came without")
    if (given := pixels_in(named)) is not None:
        raise ValueError(f"prefill_chunk={chunk} can't split a prompt with images ({given})")
    for name in WHOLE:
        asked = named.get(name, getattr(module.config, name, None))
        if asked is not None and asked is not False:
            raise ValueError(f"prefill_chunk={chunk} can't be combined with {name}: it would need the whole prompt")
    ends, kept, start = chunk_ends(tokens.shape[1], chunk), [], 0
    wanted = named.get("logits_to_keep", 0)
    few = isinstance(wanted, int) and 0 < wanted <= ends[-1] - ends[-2]
    if not few and not (isinstance(wanted, int) and wanted == 0):
        raise ValueError(f"prefill_chunk={chunk}: logits_to_keep={wanted!r} must be 0 or fit within the last chunk")
    if not few and named.get("return_dict") is False:
        raise ValueError(f"prefill_chunk={chunk} needs return_dict=True where the logits of all tokens are asked for")
    length = whole_length(module, named, read, ends) if by_length(module) else 0
    with as_long_as(module, length) if length else nullcontext():
        for stop in ends[:-1]:
            out = module(**part(named, start, stop, ends[-1]) | ({"logits_to_keep": 1} if few else {}))
            if not few:
                kept.append(of_tokens(out, module, stop - start, chunk))
            start = stop
    return part(named, start, ends[-1], tokens.shape[1]), kept


def whole_length(module: Any, named: Mapping[str, Any], read: int, ends: list[int]) -> int:
    """Positions up to the last of a call, by which its rotations turn.

    ValueError where the last chunk does not reach it: that chunk would turn by the angles of a shorter text.
    """
    places = named.get("position_ids")
    if not isinstance(places, Tensor):
        return read + ends[-1]
    last, length = places[..., ends[-2] :].max() + 1, places.max() + 1
    if last != length:
        raise ValueError(
            f"prefill_chunk: {type(module).__name__} turns by the text's length, and the last chunk ends at position "
            f"{int(last) - 1}, before {int(length) - 1}: read the prompt at once, or with padding in front"
        )
    return int(length)


def part(named: Mapping[str, Any], start: int, stop: int, length: int) -> dict[str, Any]:
    """The arguments of a call over tokens `start` to `stop` of `length`."""
    made = dict(named)
    for name, value in named.items():
        if not isinstance(value, Tensor):
            continue
        if name == "attention_mask" and value.dim() == 2:
            made[name] = value[:, : value.shape[1] - length + stop]
        elif name in ("input_ids", "inputs_embeds", "token_type_ids") and value.shape[1] == length:
            made[name] = value[:, start:stop]
        elif name in ("position_ids", "cache_position") and value.shape[-1] == length:
            made[name] = value[..., start:stop]
    return made


def of_tokens(out: Any, module: Any, tokens: int, chunk: int) -> Tensor:
    """Logits of a chunk's tokens, or the last hidden states of a model without a head.

    Fewer than its tokens where a method lets only some go on. ValueError where a head answers otherwise, with one label
    for a text, say: the chunks' answers would make none.
    """
    found = out[0] if isinstance(out, tuple) else getattr(out, output_name(out), None)
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[1] > tokens:
        raise ValueError(
            f"prefill_chunk={chunk}: {type(module).__name__} does not answer token by token; read its text at once, "
            "with another cache"
        )
    return found


def output_name(out: Any) -> str:
    """Which of a model output's fields has one row for each token."""
    return "logits" if hasattr(out, "logits") else "last_hidden_state"


def put_together(out: Any, kept: list[Tensor]) -> None:
    """Put the earlier chunks' outputs before the last one's, in place."""
    if not kept:
        return
    name = output_name(out)
    setattr(out, name, torch.cat([*kept, getattr(out, name)], 1))
