"""Importance of tokens, and the choice of the most important."""

from kvfold.ops import top_mask
from kvfold.scores.choose import drop_from, drop_lowest, keep_top, ranked, smooth

__all__ = ["drop_from", "drop_lowest", "keep_top", "ranked", "smooth", "top_mask"]
