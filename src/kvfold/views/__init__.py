"""What a method sees, and what it may decide."""

from kvfold.views.layer_view import ATTENTION, COLUMN_SUMS, LayerView, fade_of, faded
from kvfold.views.place import HiddenView, NewWords, Place, Site
from kvfold.views.prompts import CacheView, LookAhead, PromptView, RawPrompt, Reader, ReadOn, Requests, answered
from kvfold.views.queries import Images, Queries
from kvfold.views.token_view import IMAGE

__all__ = [
    "ATTENTION",
    "COLUMN_SUMS",
    "IMAGE",
    "CacheView",
    "HiddenView",
    "Images",
    "LayerView",
    "LookAhead",
    "NewWords",
    "Place",
    "PromptView",
    "Queries",
    "RawPrompt",
    "ReadOn",
    "Reader",
    "Requests",
    "Site",
    "answered",
    "fade_of",
    "faded",
]
