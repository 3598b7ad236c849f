"""Forward hooks on a model: its passes tell their cache what they read, in what order, and which tokens go on."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvfold.hf import attention
from kvfold.hf.anatomy import attention_modules, same_text, text_alone, text_decoder
from kvfold.hf.argument import cache_in
from kvfold.hf.call.arguments import check_arguments
from kvfold.hf.call.call import greedy_of
from kvfold.hf.call.chunks import put_together, read_ahead
from kvfold.hf.call.generating import watch_generation
from kvfold.hf.call.given import ids_of
from kvfold.hf.call.host import Host
from kvfold.hf.call.images import check_ids, find_images, refuse_pixels
from kvfold.hf.call.narrow import before_layer
from kvfold.hf.call.preparing import watch_preparing
from kvfold.hf.call.rewriting import placed_behind, reread
from kvfold.hf.call.splitting import part_for, watch_parts
from kvfold.hf.eager import eager
from kvfold.hf.gradient import refuse_gradient
from kvfold.hf.images import image_ids
from kvfold.hf.latent import is_latent, watch_latent
from kvfold.hf.layers import PagedLayer
from kvfold.methods.base import Method


def use_kvfold(model: PreTrainedModel) -> None:
    """Set the model's attention to "kvfold" and let its forward passes tell their cache what they read."""
    attention.register()
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation != attention.NAME:  # towers beside the decoder keep theirs
        model.set_attn_implementation(text_alone(model.config, text, attention.NAME) or attention.NAME)
    for module in attention_modules(model).values():
        if is_latent(module):
            watch_latent(module)
    watch_parts(model)
    hook(model)


def hook(model: PreTrainedModel) -> None:
    """Let a model's forward passes tell their cache what they read."""
    watch_preparing(model)
    if not getattr(model, "_kvfold_hooks", None):
        body = text_decoder(model)
        model._kvfold_hooks = (
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, with_kwargs=True),
            body.register_forward_pre_hook(_before_body, with_kwargs=True),
        )
    watch_generation(model)


def watch(model: PreTrainedModel, method: Method) -> None:
    """Set the hooks that only some methods need."""
    if method.narrows:
        watch_layers(model)
    if method.listens("admit"):
        watch_attention(model)
    if "images" in method.asks and image_ids(model):
        watch_text(model)


def watch_layers(model: PreTrainedModel) -> None:
    """Let the decoder's layers ask whether all tokens of a pass go on. ValueError where they can't be found."""
    layers = getattr(text_decoder(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers whose input could be narrowed")
    if not getattr(model, "_kvfold_layer_hooks", None):
        model._kvfold_layer_hooks = tuple(
            layer.register_forward_pre_hook(partial(_before_layer, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        )


def watch_attention(model: PreTrainedModel) -> None:
    """Let the attention modules hand what enters them to the paged layers of caches whose method admits tokens."""
    if not getattr(model, "_kvfold_attention_hooks", None):
        model._kvfold_attention_hooks = tuple(
            module.register_forward_pre_hook(partial(_before_attention, index), with_kwargs=True)
            for index, module in attention_modules(model).items()
        )


def watch_text(model: PreTrainedModel) -> None:
    """Let the text decoder ask whether somebody has seen a prompt's ids: it gets embeddings where there are images."""
    if not getattr(model, "_kvfold_text_hooks", None):
        model._kvfold_text_hooks = (text_decoder(model).register_forward_pre_hook(_before_text, with_kwargs=True),)


def _cache_of(kwargs: dict[str, Any]) -> Host | None:
    cache = cache_in(kwargs)
    return cache if isinstance(cache, Host) else None


def _before_body(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    cache = _cache_of(kwargs)
    if cache is None or (torch.compiler.is_compiling() and cache.call.marks is not None):
        return  # a graph is made of a call whose own hook has asked
    _check_own(cache, module)
    call = cache.call
    if call.marks is None and not call.asked:  # else somebody has asked
        read = kwargs.get("input_ids", args[0] if args else None)
        read = kwargs.get("inputs_embeds") if read is None else read
        call.part = part_for(cache, read.shape[1], kwargs) if isinstance(read, torch.Tensor) else 0
    call.asked, call.through = False, 0


@eager
def _check_own(cache: Host, module: nn.Module) -> None:
    """ValueError where a model is called with the cache of another, whose keys mean something else."""
    if module is not cache.model and not same_text(module, cache.model):
        raise ValueError(
            f"the cache was made for another {type(cache.model).__name__} than the {type(module).__name__} that is "
            "called with it: give each model a cache of its own, kvfold.Cache(model, ...)"
        )


@eager
def _before_text(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    cache = _cache_of(kwargs)
    if cache is None or module is cache.model:
        return
    if any("images" in group.method.asks for group in cache.rows.groups):
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        check_ids(cache, tokens.shape[1])


# With a partial, not a closure: a model with hooks can be pickled (torch.save).
@eager
def _before_attention(index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    cache = _cache_of(kwargs)
    layer = None if cache is None or not cache.rows.listens("admit") else cache.layers[index]
    if isinstance(layer, PagedLayer):
        layer.entering = kwargs.get("hidden_states", args[0] if args else None)


@eager
def _before_layer(
    index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    cache = _cache_of(kwargs)
    return None if cache is None else before_layer(cache, index, args, kwargs)


@eager
def _before_forward(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    cache = _cache_of(kwargs)
    if cache is None:
        return None
    _check_own(cache, module)
    if _inner(cache, module):
        return None
    refuse_pixels(cache, kwargs)
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False with a cache would read the whole text again at every step: leave one out")
    if cache.paged:
        refuse_gradient(kwargs)
        if kwargs.get("output_attentions", getattr(cache.model.config, "output_attentions", None)):
            raise ValueError(
                "output_attentions=True: a kvfold cache attends without a matrix of weights; observe the layers' views "
                "instead (cache.observed), or read without the cache under attn_implementation='eager'"
            )
    changed, own = None, _outermost(cache, module)
    if own:
        check_arguments(args, kwargs, cache.rows.width)
        cache.forgive()
    cache.settle_pending()
    if own:
        given = ids_of(args, kwargs)
        other, after = reread(cache, args, kwargs), cache.reading
        if other is not None:
            kwargs, after = other
            args, changed = (), ((), kwargs)
        cache.begin_call(after, given)
    cache.call.chunks = None  # of a call that failed
    if cache.prefill_chunk is not None and not cache.mode.whole:
        if cache.pending.recording:
            raise ValueError(f"prefill_chunk={cache.prefill_chunk} can't be combined with assisted decoding")
        with cache.within(prefilling=True, parts=True):
            ahead = read_ahead(module, args, kwargs, cache.prefill_chunk, cache.get_seq_length())
        if ahead is not None:
            kwargs, cache.call.chunks = ahead[0], (module, ahead[1])
            args, changed = (), ((), kwargs)
            cache.settle_pending()
    ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    if ids is None and module is not cache.model:
        return changed  # the text decoder of the model that got the ids
    cache.check_words(ids)
    call = cache.call
    call.token_ids, call.plan = (ids if isinstance(ids, torch.Tensor) else None), None
    call.mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    call.images = find_images(cache, call.token_ids, call.mask)
    read = ids if ids is not None else kwargs.get("inputs_embeds")
    if isinstance(read, torch.Tensor) and len(args) < 2 and (placed := placed_behind(cache, module, kwargs, read)):
        kwargs, changed = placed, (args, placed)
    if call.marks is not None and isinstance(read, torch.Tensor):
        if _drafted(kwargs) >= read.shape[1] - 1 and cache.rows.width:
            cache.pending.opening = False  # one token and its candidates: nothing was added to the text
        cache.check_pass(read.shape[1], read.shape[0])
    if isinstance(read, torch.Tensor):
        call.part = part_for(cache, read.shape[1], kwargs)
    return changed


@eager
def _after_forward(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_of(kwargs)
    if cache is None or _inner(cache, module):
        return
    cache.check_consumed()
    call = cache.call
    if call.chunks is not None and call.chunks[0] is module:
        (_, kept), call.chunks = call.chunks, None
        put_together(output, kept)
    plan, call.plan, call.token_ids, call.mask, call.images = call.plan, None, None, None, None
    if plan is None and cache.paged and _outermost(cache, module):
        raise RuntimeError(
            f"{type(module).__name__} was given a kvfold cache and has not read with it: its layers kept to a cache "
            "of their own, or to none"
        )
    given_back = cache_in(output) if isinstance(output, dict) else None
    if given_back is not None and given_back is not cache and _outermost(cache, module):
        raise RuntimeError(
            f"{type(module).__name__} was given a kvfold cache and gives back a {type(given_back).__name__}, "
            "with which generate would go on"
        )
    chosen = isinstance(kwargs.get("logits_to_keep"), torch.Tensor)  # columns in an order that nobody knows
    cache.pending.uncropped = cache.pending.recording
    with cache.ending() if _outermost(cache, module) else nullcontext():
        cache.finish(plan, lambda read: greedy_of(None if chosen else output, read))
    for window in cache.coded_windows if not cache.mode.parts else ():
        window.settle()  # also where the caller called the model's body


def _drafted(kwargs: dict[str, Any]) -> int:
    """Candidates that end a pass of assisted decoding, which asks for their logits and one more; 0: nobody says."""
    wanted = kwargs.get("logits_to_keep")
    return wanted - 1 if isinstance(wanted, int) and wanted > 0 else 0


def _outermost(cache: Host, module: nn.Module) -> bool:
    """Whether a call is the caller's own, not a chunk of one."""
    return module is cache.model and not cache.mode.parts


def _inner(cache: Host, module: nn.Module) -> bool:
    """Whether a call is a part of the model's: of a body that was once given a cache of its own, and so has hooks."""
    return module is not cache.model and cache.call.marks is not None
