"""Methods: one file per paper."""

from kvfold.methods.base import Method, MethodInfo, Pipeline, method
from kvfold.methods.registry import get_method, list_methods, parse
from kvfold.methods.scored import Scored, Wrapper
from kvfold.views import CacheView, LookAhead, ReadOn

__all__ = [
    "CacheView",
    "LookAhead",
    "Method",
    "MethodInfo",
    "Pipeline",
    "ReadOn",
    "Scored",
    "Wrapper",
    "get_method",
    "list_methods",
    "method",
    "parse",
]
