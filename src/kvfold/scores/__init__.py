"""Importance of tokens, and the choice of the most important."""

from kvfold.scores.choose import keep_top, smooth, top_mask

__all__ = ["keep_top", "smooth", "top_mask"]
