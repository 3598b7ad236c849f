"""kvfold: long contexts with a small KV cache, for transformers models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfold.formats import Dense as Dense
    from kvfold.hf.cache import Cache as Cache
    from kvfold.hf.linears import fast_linears as fast_linears
    from kvfold.methods import Method as Method
    from kvfold.methods import MethodInfo as MethodInfo
    from kvfold.methods import Pipeline as Pipeline
    from kvfold.methods import list_methods as list_methods
    from kvfold.methods import method as method
    from kvfold.methods import parse as parse
    from kvfold.models.load import load as load
    from kvfold.pages import Arena as Arena
    from kvfold.pages import OutOfPages as OutOfPages
    from kvfold.views import LayerView as LayerView
    from kvfold.views.decisions import Drop as Drop
    from kvfold.views.decisions import Keep as Keep
    from kvfold.views.decisions import Read as Read
    from kvfold.views.decisions import Rewrite as Rewrite
    from kvfold.views.decisions import Store as Store

__version__ = "0.1.0"
_PLACES = {
    "Cache": "hf.cache", "fast_linears": "hf.linears", "load": "models.load", "Dense": "formats", "LayerView": "views",
    **dict.fromkeys(["Arena", "OutOfPages"], "pages"),
    **dict.fromkeys(["Method", "MethodInfo", "Pipeline", "list_methods", "method", "parse"], "methods"),
    **dict.fromkeys(["Drop", "Keep", "Read", "Rewrite", "Store"], "views.decisions"),
}  # fmt: skip
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: `kvfold --help` needs neither.
    if name not in _PLACES:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"kvfold.{_PLACES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
