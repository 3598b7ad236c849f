"""Which of a prompt's tokens stand for images: by the ids that a model's configuration names, never by a count."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from kvfold.methods.base import Method
from kvfold.views import Images

if TYPE_CHECKING:
    from kvfold.hf.cache import Cache

IDS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")
PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")


def image_ids(model: Any) -> list[int]:
    """The ids that stand for parts of an image or a video in this model's prompts; none in a text model's."""
    return _ids_in(model.config)


def _ids_in(config: PreTrainedConfig) -> list[int]:
    """Those that a configuration names itself; else those that its parts do."""
    own = {getattr(config, name, None) for name in IDS}
    found = {one for one in own if isinstance(one, int)} or {one for part in _parts(config) for one in _ids_in(part)}
    return sorted(found)


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]


def check_images(model: Any, method: Method) -> None:
    """Raise ValueError where a method must know images and the model's configuration doesn't name their ids.

    Text models pass: some say that they read images, as the family's base class does, but have no part that would.
    """
    if "images" not in method.asks or image_ids(model):
        return
    if {"image", "video"} & {*np.atleast_1d(model.input_modalities)} and _parts(model.config):
        raise ValueError(
            f"method={method} must know which tokens are images: the configuration of {type(model).__name__} names "
            f"no id for them ({', '.join(IDS)})"
        )


def find_images(cache: "Cache", ids: Int[Tensor, "B Q"] | None, mask: Tensor | None) -> Images | None:
    """Which tokens of the pass that begins stand for images; None without ids, or where the model reads none."""
    known = image_ids(cache.model)
    if ids is None or not known or not cache.paged or not cache.reads_prompt(ids.shape[1]):
        return None
    flags = torch.isin(ids, torch.tensor(known, device=ids.device))
    if mask is not None:  # padding goes behind
        order = torch.argsort((~mask[:, -ids.shape[1] :].bool()).byte().to(ids.device), dim=1, stable=True)
        flags = flags.gather(1, order)
    seen = cache.paged[0].seen
    start = torch.from_numpy(seen).to(ids.device) if len(seen) else torch.zeros(len(ids), dtype=torch.int64)
    return Images(start.to(ids.device), flags)


def pixels_in(kwargs: Mapping[str, Any]) -> str | None:
    """The argument of a model's call that has images, or what was made of them; None: there is none."""
    given = (name for name in PIXELS if kwargs.get(name) is not None)
    return next((name for name in given if not isinstance(kwargs[name], dict) or kwargs[name]), None)


def refuse_pixels(cache: "Cache", kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where a prompt with images is to be read in another order, or again, by its ids."""
    given = pixels_in(kwargs)
    if given is not None and (cache.method.listens("read_order") or cache.method.listens("after_prompt")):
        raise ValueError(f"method={cache.method} reads a prompt's ids in its own way, which leaves {given} out")


def check_ids(cache: "Cache", tokens: int) -> None:
    """Raise ValueError where a prompt reaches the text decoder and nobody said which of its tokens are images."""
    if cache.paged and cache._images is None and cache.listening and cache.reads_prompt(tokens):
        raise ValueError(
            f"method={cache.method} must know which tokens are images: call {type(cache.model).__name__} with input_ids"
        )
