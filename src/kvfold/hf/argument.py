"""Under which name a model takes its cache: `cache` where its forward has that (transformers 5.24), else the older."""

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import Any

OLD, NEW = "past_key_values", "cache"


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument for a call of `model`, or of its `generate`."""
    return {name_of(type(model).forward): cache}


@lru_cache(maxsize=64)
def name_of(forward: Callable[..., Any]) -> str:
    """The name that a class of models has for it, by its `forward`."""
    return NEW if NEW in signature(forward).parameters else OLD


def cache_in(kwargs: dict[str, Any]) -> Any:
    """What a call was given, by either name; None: nothing."""
    found = kwargs.get(NEW)
    return kwargs.get(OLD) if found is None else found
