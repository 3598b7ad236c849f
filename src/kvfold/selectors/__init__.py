"""What a query reads of all that is stored: an index of stretches of tokens, and a choice by what it says of them."""

from kvfold.selectors.bounds import Bounds
from kvfold.selectors.selection import Selection

__all__ = ["Bounds", "Selection"]
