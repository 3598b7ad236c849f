"""Methods: one file per paper."""

from kvfold.methods.base import Method, MethodInfo, Pipeline, method
from kvfold.methods.registry import get_method, list_methods, parse
from kvfold.methods.scored import Scored, Wrapper
from kvfold.views import CacheView

__all__ = [
    "CacheView",
    "Method",
    "MethodInfo",
    "Pipeline",
    "Scored",
    "Wrapper",
    "get_method",
    "list_methods",
    "method",
    "parse",
]
