"""Which tokens join, with what weights, and what mass the result has."""

from kvfold.merges.absorb import (
    FRAMES,
    absorb,
    at_home,
    counted,
    few,
    log_mass,
    log_over_set,
    mixed,
    over_set,
    rope_for,
    take,
)
from kvfold.merges.by_attention import UNSEEN, fold_by_attention
from kvfold.merges.chain import chain_links, sets_of
from kvfold.merges.fold import Folded, fold_sets
from kvfold.merges.refit import refit
from kvfold.merges.route import nearest, nearest_place, soft_match

__all__ = [
    "FRAMES",
    "UNSEEN",
    "Folded",
    "absorb",
    "at_home",
    "chain_links",
    "counted",
    "few",
    "fold_by_attention",
    "fold_sets",
    "log_mass",
    "log_over_set",
    "mixed",
    "nearest",
    "nearest_place",
    "over_set",
    "refit",
    "rope_for",
    "sets_of",
    "soft_match",
    "take",
]
