"""What a query reads of all that is stored: an index of stretches of tokens, and a choice by what it says of them."""

from kvfold.selectors.always import Always, Exempt, Shares
from kvfold.selectors.bounds import Bounds
from kvfold.selectors.keys import Keys
from kvfold.selectors.products import Products
from kvfold.selectors.reuse import Alike, Every, Reuse
from kvfold.selectors.selection import Selection
from kvfold.selectors.votes import HEADS, Vote

__all__ = [
    "HEADS",
    "Alike",
    "Always",
    "Bounds",
    "Every",
    "Exempt",
    "Keys",
    "Products",
    "Reuse",
    "Selection",
    "Shares",
    "Vote",
]
