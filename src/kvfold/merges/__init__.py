"""Which tokens join, with what weights, and what mass the result has."""

from kvfold.merges.chain import chain_links, sets_of
from kvfold.merges.fold import Folded, fold_sets

__all__ = ["Folded", "chain_links", "fold_sets", "sets_of"]
