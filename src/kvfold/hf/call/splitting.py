"""A long prompt goes through each decoder layer in parts: all layers see what one pass over it would show them.

What a layer works out for each token (projections, an MLP's inner states) is then there for a part at a time, and a
later part attends over the earlier ones, so that nothing grows with the square of the prompt. Layer by layer, not part
by part: a method decides about a layer when that has attended to the whole prompt, and queries are held for one layer.
"""

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from kvfold.artefacts.fields import text_config
from kvfold.hf.anatomy import attention_modules, text_decoder
from kvfold.hf.argument import cache_in, with_cache
from kvfold.hf.call.host import Host
from kvfold.hf.layers import PagedLayer, WindowLayer
from kvfold.hf.looking import has_weights, ids_device, is_offloaded, looking
from kvfold.hf.standing import StandIn, stand
from kvfold.layer.parts import Parts

PART = 1024
"""Tokens of a part, where nobody says: see docs/benchmarks.md for what was measured."""
PROBE, PROBED = 11, 4
"""Tokens that a model reads at once and in parts of so many, to see whether it says the same."""
CLOSE, COARSE = 1e-3, 0.05
"""How far the two may be apart, of the largest; the second in 16 bits."""
PLACES = ("position_ids", "cache_position")
"""Arguments whose last axis is the tokens."""
RECORDED = ("output_router_logits", "output_attentions")
"""What is recorded inside a layer, and would come in parts."""

_known: "WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], bool]]" = WeakKeyDictionary()
"""Of a text decoder: the hooks inside its layers, and whether it said the same in parts when it had those."""
_failed: "WeakSet[nn.Module]" = WeakSet()
"""Models of which was said that a pass failed."""


class CannotSplit(RuntimeError):
    """A layer gives more than its tokens' states, of which nobody knows how parts are put together."""


class InParts(StandIn):
    """The forward of one decoder layer, which reads a long prompt with a kvfold cache in parts."""

    name = "forward"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = None if torch.compiler.is_compiling() else cache_in(kwargs)
        if not isinstance(cache, Host) or not cache.call.part:
            return self.original(*args, **kwargs)
        splits = _splits(cache, self.module, args, kwargs)
        made = self._in_parts(cache, args, kwargs) if splits else self.original(*args, **kwargs)
        cache.call.through += 1
        cache.tell(0.0)
        return made

    def _in_parts(self, cache: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states, mask = args[0], kwargs.get("attention_mask")
        total, call, whole = states.shape[1], cache.call, False
        real = mask[:, -total:].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        parts, out = Parts(total, real), torch.empty_like(states)
        call.parts = parts
        try:
            for start in range(0, total, call.part):
                parts.reach(min(start + call.part, total))
                named = {name: part_of_argument(name, x, parts) for name, x in kwargs.items()}
                made = self.original(*(part_of_argument("", x, parts) for x in args), **named)
                whole = isinstance(made, tuple)
                if whole and any(isinstance(x, Tensor) for x in made[1:]):
                    raise CannotSplit(f"{type(self.module).__name__} gives {len(made)} tensors")
                out[:, parts.start : parts.stop] = made[0] if whole else made
                cache.tell(parts.stop / total)
        finally:
            call.parts = None
        return (out, *made[1:]) if whole else out


def watch_parts(model: Any) -> None:
    """Let the decoder's layers read long prompts in parts, where they can."""
    for layer in decoder_layers(model):
        stand(InParts, layer)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The modules that follow each other in a text decoder, an attention in each at most; none: they aren't found."""
    attending = {id(module) for module in attention_modules(model).values()}
    for module in text_decoder(model).modules():
        if isinstance(module, nn.ModuleList):
            each = [sum(id(part) in attending for part in layer.modules()) for layer in module]
            if each and max(each) == 1 and sum(each) == len(attending):
                return list(module)
    return []


def part_for(cache: Host, tokens: int, given: Mapping[str, Any]) -> int:
    """Tokens of the parts in which the layers read a prompt of so many; 0: all at once. `given`: the call's arguments.

    At once where it is no longer than a part, where what happens inside a layer is recorded, where the method chooses
    among a layer's tokens before they attend, and where the model does not say the same in parts. Unless the cache says
    how many, on the CPU alone.
    """
    size = cache.part_size
    if size is None:
        size = PART if ids_device(cache.model).type == "cpu" else 0
    if not cache.paged or not 0 < size < tokens or cache.rows.listens("admit"):
        return 0
    config = text_config(cache.model)
    if any(getattr(config, name, None) if given.get(name) is None else given[name] for name in RECORDED):
        return 0
    return size if reads_in_parts(cache) else 0


def reads_in_parts(cache: Host) -> bool:
    """Whether a model says the same of a text in parts: asked by two passes over a few tokens, again for other hooks.

    A hook on a layer sees whole passes, one on what lies inside sees the parts. A pass that fails, under somebody's
    hooks for one, is said once, and made again for the next long prompt.
    """
    model, decoder = cache.model, text_decoder(cache.model)
    layers = decoder_layers(model)
    inside = (module for layer in layers for module in layer.modules() if module is not layer)
    hooks = tuple(number for module in inside for number in (*module._forward_pre_hooks, *module._forward_hooks))
    known = _known.get(decoder)
    if known is not None and known[0] == hooks:
        return known[1]
    if not layers or not has_weights(decoder) or is_offloaded(model):
        return False
    _known[decoder] = hooks, False  # while it is asked
    try:
        _known[decoder] = hooks, _says_the_same(cache, decoder)
    except Exception as error:  # it is read at once, as it always was
        del _known[decoder]
        if decoder not in _failed:
            _failed.add(decoder)
            name, text = type(model).__name__, "whether %s reads prompts in parts is not known: %s: %s"
            logging.getLogger("kvfold").warning(text, name, type(error).__name__, error)
        return False
    return _known[decoder][1]


def _says_the_same(cache: Host, decoder: Any) -> bool:
    """Whether the last hidden states are the same, read at once and in parts."""
    vocabulary, device = text_config(cache.model).vocab_size, ids_device(decoder)
    ids = (torch.arange(1, PROBE + 1, device=device, dtype=torch.int64) * vocabulary // (PROBE + 1))[None]
    found = []
    with looking(cache.model):
        for size in (0, PROBED):
            other = cache.for_model(cache.model)
            other.call.part, other.call.asked = size, True
            found.append(decoder(input_ids=ids, use_cache=True, **with_cache(decoder, other))[0])
    close = CLOSE if found[0].dtype.itemsize >= 4 else COARSE
    whole, parts = (states.float() for states in found)
    return bool((whole - parts).abs().max() <= close * whole.abs().max())


def _splits(cache: Host, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of a decoder layer is one whose tokens can come in parts."""
    states = args[0] if args else None
    if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[1] <= cache.call.part:
        return False
    if torch.is_grad_enabled() and states.requires_grad:
        return False
    numbers = (getattr(part, "layer_idx", None) for part in module.modules())
    layer = next((cache.layers[number] for number in numbers if isinstance(number, int)), None)
    if not isinstance(layer, PagedLayer) and not (isinstance(layer, WindowLayer) and layer.band is not None):
        return False  # what it holds is transformers' own, a state for one
    if any(isinstance(x, Tensor) and x.dim() == 2 for x in args[1:]):
        return False  # a padding mask by its place, as BERT's kin give it: by name we'd know that it is one
    whole = Parts(states.shape[1])
    return all(can_cut(name, x, whole.total) for name, x in (*(("", x) for x in args), *kwargs.items()))


def can_cut(name: str, x: Any, total: int) -> bool:
    """Whether it is known what a part of `total` tokens gets of an argument."""
    if isinstance(x, tuple | list):
        return all(not isinstance(each, Tensor) or (each.dim() > 1 and each.shape[-2] == total) for each in x)
    if isinstance(x, dict):
        return not any(isinstance(each, Tensor) for each in x.values())
    if not isinstance(x, Tensor):
        return True
    if name == "attention_mask":
        return x.dim() == 2 or (x.dim() == 4 and x.shape[2] == total and not _looks_ahead(x, total))
    if name in PLACES:
        return x.dim() > 0 and x.shape[-1] == total
    return x.dim() > 1 and x.shape[1] == total


def _looks_ahead(mask: Tensor, total: int) -> bool:
    """Whether a mask (B, 1, Q, T) lets one of its `total` tokens see a later one, as those of an image may."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(seen[..., -total:].triu(1).any())


def part_of_argument(name: str, x: Any, parts: Parts) -> Any:
    """What the part in hand gets of an argument; of masks the columns up to its end."""
    start, stop, behind = parts.start, parts.stop, parts.total - parts.stop
    if isinstance(x, tuple | list):
        return type(x)(each[..., start:stop, :] if isinstance(each, Tensor) else each for each in x)
    if not isinstance(x, Tensor):
        return x
    if name == "attention_mask":
        columns = x.shape[-1] - behind
        return x[:, :columns] if x.dim() == 2 else x[:, :, start:stop, :columns]
    return x[..., start:stop] if name in PLACES else x[:, start:stop]
