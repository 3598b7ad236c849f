"""Which of a call's tokens stand for images, and what a method that must know them refuses."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.hf.call.host import Host
from kvfold.hf.images import image_ids
from kvfold.views import Images

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")


def find_images(cache: Host, ids: Int[Tensor, "B Q"] | None, mask: Tensor | None) -> Images | None:
    """Which tokens of the pass that begins stand for images; None without ids, or where the model reads none."""
    known = image_ids(cache.model)
    if ids is None or not known or not cache.paged or not cache.reads_prompt(ids.shape[1]):
        return None
    flags = torch.isin(ids, torch.tensor(known, device=ids.device, dtype=torch.int64))
    if mask is not None:  # padding goes behind
        order = torch.argsort((~mask[:, -ids.shape[1] :].bool()).byte().to(ids.device), dim=1, stable=True)
        flags = flags.gather(1, order)
    seen = cache.rows.seen
    start = torch.from_numpy(seen).to(ids.device) if len(seen) else torch.zeros(len(ids), dtype=torch.int64)
    return Images(start.to(ids.device), flags)


def pixels_in(kwargs: Mapping[str, Any]) -> str | None:
    """The argument of a model's call that has images, or what was made of them; None: there is none."""
    given = (name for name in PIXELS if kwargs.get(name) is not None)
    return next((name for name in given if not isinstance(kwargs[name], dict) or kwargs[name]), None)


def refuse_pixels(cache: Host, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where a prompt with images is to be read in another order, or again, by its ids."""
    given = pixels_in(kwargs)
    if given is not None and (cache.rows.listens("read_order") or cache.rows.listens("after_prompt")):
        raise ValueError(f"method={cache.method} reads a prompt's ids in its own way, which leaves {given} out")


def check_ids(cache: Host, tokens: int) -> None:
    """Raise ValueError where a prompt reaches the text decoder and nobody said which of its tokens are images."""
    if cache.paged and cache.call.images is None and cache.mode.listening and cache.reads_prompt(tokens):
        raise ValueError(
            f"method={cache.method} must know which tokens are images: call {type(cache.model).__name__} with input_ids"
        )
