"""What a call of the model brings: refused, before any layer has read, where it can be no text of this batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any], width: int) -> None:
    """Raise ValueError for ids or embeddings without a row or a token, and for a mask or positions of another batch.

    `width`: columns read so far. A prompt, or a further turn, in which no row has a token is refused; steps are not
    looked at, for on a GPU that would wait for it at each.
    """
    name = "input_ids" if args or kwargs.get("input_ids") is not None else "inputs_embeds"
    read = kwargs.get(name, args[0] if args else None)
    if not isinstance(read, Tensor):
        return
    wanted = "(B, Q)" if name == "input_ids" else "(B, Q, C)"
    if read.dim() != 1 + wanted.count(",") or 0 in read.shape[:2]:
        raise ValueError(f"{name} of shape {tuple(read.shape)} must be {wanted}, with at least one row and one token")
    rows, new = read.shape[:2]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 4:  # another kind of mask, which the attention refuses by its shape
        if mask.dim() != 2 or len(mask) != rows:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} must be (B, T) with the {rows} rows of {name}"
            )
        if (new > 1 or not width) and not bool(mask[:, -new:].any()):
            raise ValueError(f"attention_mask marks none of the {new} new columns as a token: nothing is to be read")
    places = kwargs.get("position_ids")
    if isinstance(places, Tensor) and (places.dim() < 2 or places.shape[-2] not in (1, rows)):
        raise ValueError(f"position_ids of shape {tuple(places.shape)} must be (B, Q) with the {rows} rows of {name}")
