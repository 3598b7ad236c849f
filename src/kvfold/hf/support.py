"""Which models kvfold can attend for."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kvfold.hf.anatomy import attention_modules, has_grid_positions, text_decoder, wrappers
from kvfold.hf.argument import NEW, OLD
from kvfold.hf.images import check_images
from kvfold.hf.source import changed_by_name, unfit
from kvfold.hf.words import check_words
from kvfold.methods.base import Method

NOTHING = "DummyLayer"
"""transformers' cache layer for a layer without attention; its releases before that one have none to import."""
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
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name} attends to an encoder (add_cross_attention); kvfold caches serve decoder-only models")
    if not model._can_set_attn_implementation():
        raise ValueError(f"the attention of {name} does not go through transformers' AttentionInterface")
    forwards = (type(model).forward, type(text_decoder(model)).forward)
    if not any({OLD, NEW} & set(signature(forward).parameters) for forward in forwards):
        raise ValueError(f"{name} takes no {OLD}: it has a state of another kind, or none")
    modes = getattr(config, "kv_sharing_modes", None) or ()
    if getattr(config, "num_kv_shared_layers", 0) or any(mode not in (None, "store") for mode in modes):
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
        check_words(model, method)
    layers = layers_of(model)
    for layer in layers:
        known = isinstance(layer, CacheLayerMixin) or hasattr(layer, "conv_states")
        if not known and type(layer).__name__ != NOTHING:
            raise ValueError(f"{name} has cache layers of type {type(layer).__name__}, which kvfold does not know")
    paged = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    others = [type(layer).__name__ for layer in layers if isinstance(layer, DynamicLayer) and not _is_plain(layer)]
    if paged and others:
        raise ValueError(
            f"{name} has cache layers of type {others[0]} beside plain ones: they would get masks made for kvfold's"
        )
    if paged:
        _check_code(model, paged)


def check_windows(model: PreTrainedModel, method: Method, layers: Sequence[Any]) -> None:
    """Raise ValueError where a model's sliding windows can't lie in the format that the method has for them."""
    name, modules = type(model).__name__, attention_modules(model)
    places = [index for index, layer in enumerate(layers) if type(layer) is DynamicSlidingWindowLayer]
    if method.windows is None or not places:
        return
    if method.narrows:
        raise ValueError(f"method={method} narrows a text on its way to windows, which then must be as they are")
    for index in places:
        kind: Any = type(modules.get(index))
        if (reason := unfit(kind)) is not None:
            raise ValueError(f"method={method}: {kind.__name__} of {name} {reason}, so its windows lie as they are")


def has_windows(model: PreTrainedModel) -> bool:
    """Whether a model has sliding windows, which may hold their tokens in a format."""
    return any(type(layer) is DynamicSlidingWindowLayer for layer in layers_of(model))


def _is_plain(layer: DynamicLayer) -> bool:
    """Whether a layer is one that goes on pages, or one with a mask of its own."""
    return type(layer) is DynamicLayer or isinstance(layer, DynamicSlidingWindowLayer)


def _check_code(model: PreTrainedModel, paged: list[int]) -> None:
    """Raise ValueError where a model's code can't go with an attention function of another name."""
    name, modules = type(model).__name__, attention_modules(model)
    around = wrappers(model)
    if not all(part._supports_sdpa for part in around if isinstance(part, PreTrainedModel)):
        raise ValueError(f"{name} can't run with attn_implementation='sdpa', which a kvfold cache's attention is")
    for index in paged:
        kind: Any = type(modules.get(index))
        reason = unfit(kind)
        if reason is not None:
            raise ValueError(f"{kind.__name__} of {name} {reason}, which kvfold does not support yet")
        if "CrossAttention" in kind.__name__:
            raise ValueError(f"{name} attends in layer {index} to more than its text, which kvfold can't hold")
    question = changed_by_name({type(module) for module in (*around, *text_decoder(model).modules())})
    if question is not None:
        raise ValueError(
            f"{name} computes something else with an attention of another name ({question.where} asks: "
            f"{question.text}), so it can't have kvfold's"
        )


def layers_of(model: PreTrainedModel) -> list[Any]:
    """The cache layers that transformers would make for a model. ValueError where it makes none."""
    try:
        made: list[Any] = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"transformers makes no cache for {type(model).__name__}: {error}") from error
    return made
