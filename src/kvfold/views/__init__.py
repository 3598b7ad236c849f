"""What a method sees, and what it may decide."""

from kvfold.views.layer_view import ATTENTION, COLUMN_SUMS, IMAGE, LayerView, fade_of, faded
from kvfold.views.place import HiddenView, Place, Site
from kvfold.views.prompts import CacheView, PromptView, RawPrompt
from kvfold.views.queries import Images, Queries

__all__ = [
    "ATTENTION",
    "COLUMN_SUMS",
    "IMAGE",
    "CacheView",
    "HiddenView",
    "Images",
    "LayerView",
    "Place",
    "PromptView",
    "Queries",
    "RawPrompt",
    "Site",
    "fade_of",
    "faded",
]
