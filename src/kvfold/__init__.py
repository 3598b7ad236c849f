"""kvfold: long contexts with a small KV cache, for any transformers model."""

from typing import TYPE_CHECKING, Any

from kvfold.formats import Dense
from kvfold.methods import Method, MethodInfo, Pipeline, list_methods, method, parse
from kvfold.pages import Arena, OutOfPages
from kvfold.views import LayerView
from kvfold.views.decisions import Drop, Keep, Read, Rewrite, Store

if TYPE_CHECKING:
    from kvfold.hf.cache import Cache
    from kvfold.models.load import load

__version__ = "0.1.0"
__all__ = [
    "Arena",
    "Cache",
    "Dense",
    "Drop",
    "Keep",
    "LayerView",
    "Method",
    "MethodInfo",
    "OutOfPages",
    "Pipeline",
    "Read",
    "Rewrite",
    "Store",
    "list_methods",
    "load",
    "method",
    "parse",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; methods, formats and kernels do not need it.
    if name == "Cache":
        from kvfold.hf.cache import Cache

        return Cache
    if name == "load":
        from kvfold.models.load import load

        return load
    raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
