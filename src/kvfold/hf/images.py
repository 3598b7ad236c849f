"""Which of a prompt's tokens stand for images: by the ids that a model's configuration names, never by a count."""

from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedConfig

from kvfold.methods.base import Method

if TYPE_CHECKING:
    pass

IDS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")


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
