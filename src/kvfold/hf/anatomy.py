"""Where a transformers model has its parts: text decoder, attention modules, projections."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvfold.hf.source import EXPAND

PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""What models call the projection behind the heads of their attention."""


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention modules by layer index; those of a vision tower hold nothing that is cached."""
    found: dict[int, nn.Module] = {}
    for module in text_decoder(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and (type(module).__name__.endswith("Attention") or hasattr(module, EXPAND)):
            found.setdefault(index, module)
    return found


def projected(module: Any, outputs: Float[Tensor, "*R W"]) -> Float[Tensor, "*R E"]:
    """What an attention module makes of its heads' outputs, side by side; the same where it has no projection."""
    for name in PROJECTIONS:
        project = getattr(module, name, None)
        if isinstance(project, nn.Module) and getattr(project, "in_features", outputs.shape[-1]) == outputs.shape[-1]:
            made: Tensor = project(outputs)
            return made
    return outputs


def text_decoder(model: nn.Module) -> nn.Module:
    """The part that reads text: a vision tower has a rotary embedding of its own."""
    inner: Any = getattr(model, "get_decoder", None)
    found = inner() if callable(inner) else None
    return found if isinstance(found, PreTrainedModel) else model  # ModernBERT's "decoder" is its language model head


def same_text(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are one model, as far as text goes: a model and its body, or two heads on one body."""
    if text_decoder(one) is text_decoder(other):
        return True
    return any(one is part for part in other.modules()) or any(other is part for part in one.modules())


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The modules that the text decoder lies in, the model first, and that itself: not the towers beside it."""
    decoder = text_decoder(model)
    return [module for module in model.modules() if any(part is decoder for part in module.modules())]


def text_alone(config: PreTrainedConfig, text: PreTrainedConfig, value: str) -> Any:
    """What `set_attn_implementation` is to be given to set `value` for the text decoder and what it lies in."""
    parts = {
        name: made
        for name in config.sub_configs
        if isinstance(part := getattr(config, name, None), PreTrainedConfig)
        and (made := text_alone(part, text, value)) is not None
    }
    if config is text:
        return value
    return {"": value, **parts} if parts else None


def has_grid_positions(model: Any) -> bool:
    """Whether the parts of an image have places in a grid (M-RoPE): RoPE's positions are then not those of the text.

    In a text model alone all axes count the same, and they are.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "rope_parameters", None) or {}
    return config is not model.config and isinstance(kinds, dict) and "mrope_section" in kinds
