"""What a query reads of all that is stored: an index of stretches of tokens, and a choice by what it says of them."""

from kvfold.selectors.always import Always, Exempt, Proportions
from kvfold.selectors.bounds import Bounds
from kvfold.selectors.codebook import Codebook
from kvfold.selectors.heaviest import Heaviest
from kvfold.selectors.keys import Keys
from kvfold.selectors.products import Products
from kvfold.selectors.reuse import Alike, Every, Reuse
from kvfold.selectors.selection import Selection
from kvfold.selectors.unheld import Unheld
from kvfold.selectors.vectors import Vectors
from kvfold.selectors.votes import HEADS, Vote

__all__ = [
    "HEADS",
    "Alike",
    "Always",
    "Bounds",
    "Codebook",
    "Every",
    "Exempt",
    "Heaviest",
    "Keys",
    "Products",
    "Proportions",
    "Reuse",
    "Selection",
    "Unheld",
    "Vectors",
    "Vote",
]
