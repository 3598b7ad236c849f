"""Importance of tokens, and the choice of the most important."""

from kvfold.ops import top_mask
from kvfold.scores.choose import keep_top, smooth

__all__ = ["keep_top", "smooth", "top_mask"]
