"""What a query reads of all that is stored: an index of stretches of tokens, and a choice by what it says of them."""

from kvfold.selectors.always import Always, Exempt, Proportions
from kvfold.selectors.bounds import Bounds
from kvfold.selectors.codebook import Codebook
from kvfold.selectors.corners import Corners
from kvfold.selectors.handed import Gives, Takes
from kvfold.selectors.heads import SomeHeads
from kvfold.selectors.heaviest import Heaviest
from kvfold.selectors.hierarchical import Hierarchical
from kvfold.selectors.keys import Keys
from kvfold.selectors.lasting import Lasting
from kvfold.selectors.means import Means
from kvfold.selectors.odd import Odd
from kvfold.selectors.places import Places
from kvfold.selectors.products import Products
from kvfold.selectors.representatives import Representatives, looked
from kvfold.selectors.reuse import Alike, Every, Reuse
from kvfold.selectors.selection import Selection
from kvfold.selectors.sentences import SENTENCE, Sentences
from kvfold.selectors.stretches import OfStretches, Stretches
from kvfold.selectors.unremembered import Unremembered
from kvfold.selectors.vectors import Vectors
from kvfold.selectors.votes import HEADS, Vote
from kvfold.selectors.windows import WindowMeans

__all__ = [
    "HEADS",
    "SENTENCE",
    "Alike",
    "Always",
    "Bounds",
    "Codebook",
    "Corners",
    "Every",
    "Exempt",
    "Gives",
    "Heaviest",
    "Hierarchical",
    "Keys",
    "Lasting",
    "Means",
    "Odd",
    "OfStretches",
    "Places",
    "Products",
    "Proportions",
    "Representatives",
    "Reuse",
    "Selection",
    "Sentences",
    "SomeHeads",
    "Stretches",
    "Takes",
    "Unremembered",
    "Vectors",
    "Vote",
    "WindowMeans",
    "looked",
]
