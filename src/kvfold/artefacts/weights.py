"""Which weights a model has, told by a sample of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SAMPLES = 256
"""Numbers of each weight that are looked at."""
INNER = ("base_layer", "original_module")
"""What PEFT calls a layer that it has wrapped, inside the wrapper."""
TABLE = "inv_freq"
"""In the names of buffers that follow from the config, and from the length of what was read last."""


def sample(digest: Any, module: Any) -> None:
    """Give `digest` (of `hashlib`) the names, shapes and dtypes of a module's weights, and numbers of each.

    On any device, and of weights that accelerate brings for a pass (read where they lie, a weight at a time). Buffers
    count: quantised layers have their weights there. Of PEFT's adapters those count that are on, under whatever name,
    so that a model whose adapters are off is the model without. Cheap, not a proof. ValueError for weights on "meta"
    that nobody brings.
    """
    entries, ties = _entries(module), getattr(module, "all_tied_weights_keys", None) or {}
    shared: dict[str, bytes] = {}
    for path, weight in (*module.named_parameters(), *module.named_buffers()):
        known = _known(path, entries)
        if known is None or TABLE in path:
            continue
        there = _brought(module, path, weight) if weight.is_meta else weight
        numbers, owner = b"".join(_numbers(part) for part in _parts(there.detach())), ties.get(path, path)
        if weight.is_meta and shared.get(owner) == numbers:
            continue  # tied: one weight under two names, which on "meta" are two
        shared.setdefault(owner, numbers)
        digest.update(f"{known} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(numbers)


def movers(module: Any) -> tuple[Any, ...]:
    """What accelerate has put on a module, to bring its weights or move what it is given."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _brought(module: Any, path: str, weight: Tensor) -> Tensor:
    """A weight on "meta" as accelerate brings it, from the module that holds it or one around that."""
    steps = path.split(".")
    for end in reversed(range(len(steps))):
        for mover in movers(module.get_submodule(".".join(steps[:end]))):
            try:
                found = (getattr(mover, "weights_map", None) or {})[".".join(steps[end:])]
            except KeyError:
                continue
            if isinstance(found, Tensor) and not found.is_meta:
                return found if found.dtype == weight.dtype else found.to(weight.dtype)
    raise ValueError(
        f"{path} of {type(module).__name__} is on 'meta', and no hook of accelerate's brings it: "
        "a cache is saved and loaded for a model by its weights, so they must be there, or offloaded by accelerate"
    )


def _numbers(part: Tensor) -> bytes:
    flat = part.reshape(-1)
    some = flat[:: max(1, len(flat) // SAMPLES)].cpu().contiguous()
    return some.view(torch.uint8).numpy().tobytes()


def _entries(module: Any) -> dict[str, str | None]:
    """What adapters keep in the layers that they have wrapped, and as what it counts; None: its adapter is off."""
    entries: dict[str, str | None] = {}
    for path, layer in module.named_modules():
        active = getattr(layer, "active_adapters", None)
        if not isinstance(active, list | tuple) or not any(hasattr(layer, name) for name in INNER):
            continue
        merged = getattr(layer, "merged_adapters", ())  # those are in the layer's own weights
        live = [] if getattr(layer, "disable_adapters", False) else sorted(set(active) - set(merged))
        scaling = getattr(layer, "scaling", None) or {}
        for name, table in layer.named_children():
            keys = () if name in INNER or not callable(getattr(table, "keys", None)) else table.keys()
            for key in keys:
                on = key in live
                entries[f"{path}.{name}.{key}"] = f"{path}.{name} {live.index(key)} {scaling.get(key)}" if on else None
    return entries


def _known(path: str, entries: dict[str, str | None]) -> str | None:
    """As what a weight counts: its path in a model without adapters; None: it does not."""
    steps = path.split(".")
    for end in range(1, len(steps) + 1):
        entry = ".".join(steps[:end])
        if entry in entries:
            return entries[entry]
    return ".".join(step for step in steps if step not in INNER)


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """What a weight is made of: quantised ones, of packages that make them a type of tensor, of several."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
    else:
        yield weight
