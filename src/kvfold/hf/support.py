"""Which models kvfold can attend for."""

from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvfold.hf.anatomy import attention_modules, has_grid_positions
from kvfold.hf.images import check_images
from kvfold.methods.base import Method

INSIDE = ("_orig_mod", "base_model", "pretrained_model", "model")
"""Under what name wrappers hold the model that they call: of torch.compile, of adapters, of value heads."""


def unwrapped(model: Any) -> Any:
    """The transformers model that a wrapper calls (a PeftModel, torch.compile's module); a model as it is.

    Raises ValueError for wrappers whose calls a cache can't follow, saying what to pass.
    """
    outside, seen = type(model).__name__, [model]
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"model={outside} spreads a call over copies of the model, and a cache has one: pass model.module, and "
                "call that with the cache"
            )
        kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
        if kind is not None and str(getattr(kind, "value", kind)) == "PREFIX_TUNING":
            raise ValueError(
                f"model={outside} puts a learned prefix in the cache's place (prefix tuning): not supported"
            )
        # Its own parts alone: many look up in the model what they lack.
        own = dict(model.named_children()) if isinstance(model, nn.Module) else {}
        base = getattr(type(model), "get_base_model", None)
        inner = base(model) if base is not None else next((own[name] for name in INSIDE if name in own), None)
        if inner is None or any(inner is x for x in seen):
            raise ValueError(
                f"model={outside} is not a transformers PreTrainedModel, nor a wrapper that holds one as "
                f"{', '.join(INSIDE)}: pass the PreTrainedModel that it calls"
            )
        seen.append(inner)
        model = inner
    return model


def check_model(model: Any, method: Method | None = None) -> None:
    """Raise ValueError unless kvfold can attend for this model, and `method` with it; the message says what lacks."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model={type(model).__name__} is not a transformers PreTrainedModel")
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; kvfold caches serve decoder-only models")
    if not model._can_set_attn_implementation():
        raise ValueError(f"the attention of {name} does not go through transformers' AttentionInterface")
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"{name} shares keys and values between layers, which kvfold does not support yet")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(f"{name} caps its logits (attn_logit_softcapping), which kvfold does not support yet")
    if any(getattr(module, "sinks", None) is not None for module in attention_modules(model).values()):
        raise ValueError(f"{name} attends with learned sinks, which kvfold does not support yet")
    if any(hasattr(module, "recurrent_states") for module in model.modules()):
        raise ValueError(
            f"{name} keeps its recurrent states in its modules, where no cache finds them: a second text, a fork or a "
            "file would go on from another's"
        )
    reads_on = method is not None and (method.listens("read_order") or method.listens("after_prompt"))
    if reads_on and has_grid_positions(model):
        raise ValueError(f"method={method} reads text on at its own positions, and {name} gives images others (M-RoPE)")
    if method is not None:
        check_images(model, method)
    for layer in DynamicCache(config=config).layers:
        if not (isinstance(layer, CacheLayerMixin) or hasattr(layer, "conv_states")):
            raise ValueError(f"{name} has cache layers of type {type(layer).__name__}, which kvfold does not know")
