"""Letting go of the tokens that came first, as a window does: page by page where a format has pages of codes."""

import numpy as np
import torch

from kvfold.formats.segment import Format, Segment
from kvfold.formats.tailed import TailedSegment
from kvfold.pages import PAGE_SIZE


def unit_of(form: Format) -> int:
    """Tokens that a segment of a format lets go of at a time: a page of codes, or a page of tokens, for its memory.

    Raises ValueError for a format whose tokens go all at once.
    """
    if form.traits.addressed == "whole":
        raise ValueError(f"{form} drops all of its tokens or none")
    return int(getattr(form, "group", PAGE_SIZE)) if form.traits.addressed == "page" else PAGE_SIZE


def drop_oldest(form: Format, segment: Segment, most: np.ndarray) -> None:
    """Drop the first `most[b, h]` tokens of each row, less what would leave a part of a page of codes."""
    if form.traits.addressed == "page" and isinstance(segment, TailedSegment):
        coded, unit = segment.coded.counts(), unit_of(form)
        most = np.where(most >= coded, most, most // unit * unit)
    if not most.any():
        return
    valid, _ = segment.columns()
    first = torch.from_numpy(most).to(valid.device)[..., None]
    segment.keep(valid & (valid.cumsum(-1) > first), {}, slack=True)
