"""Formats: how a segment stores its tokens, and how it answers a query over them."""

from kvfold.formats.balanced import BALANCER, Balanced, BalancedSegment
from kvfold.formats.chosen import Chosen
from kvfold.formats.dense import Dense, DenseSegment
from kvfold.formats.depth import Depth, DepthSegment
from kvfold.formats.elite import Basis, Elite, EliteSegment
from kvfold.formats.fp8 import Fp8, Fp8Segment
from kvfold.formats.index import ByBounds, ByKeys, Chooser, Giving, Handed, Index, Reader, Remembered, Taking
from kvfold.formats.indexed import Indexed, IndexedSegment
from kvfold.formats.kinds import KINDS, dtype_from, format_from, format_to, register
from kvfold.formats.kivi import Kivi, KiviSegment
from kvfold.formats.levels import Levels
from kvfold.formats.paged import PagedSegment
from kvfold.formats.picked import Picked
from kvfold.formats.rotated import Rotated, RotatedSegment
from kvfold.formats.segment import Format, Segment, Spec, Traits
from kvfold.formats.separable import WEIGHTS, Separable, SeparableSegment
from kvfold.formats.shadowed import Shadowed, ShadowedSegment
from kvfold.formats.sparse import Sparse, SparseSegment
from kvfold.formats.summed import Summed, SummedSegment
from kvfold.formats.thin import Thin, ThinSegment
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk, LateChunk, join
from kvfold.formats.uneven import LEVELS, Uneven, UnevenSegment

__all__ = [
    "BALANCER",
    "KINDS",
    "LEVELS",
    "LOG_MASS",
    "POSITION",
    "WEIGHTS",
    "Balanced",
    "BalancedSegment",
    "Basis",
    "ByBounds",
    "ByKeys",
    "Chooser",
    "Chosen",
    "Chunk",
    "Dense",
    "DenseSegment",
    "Depth",
    "DepthSegment",
    "Elite",
    "EliteSegment",
    "Format",
    "Fp8",
    "Fp8Segment",
    "Giving",
    "Handed",
    "Index",
    "Indexed",
    "IndexedSegment",
    "Kivi",
    "KiviSegment",
    "LateChunk",
    "Levels",
    "PagedSegment",
    "Picked",
    "Reader",
    "Remembered",
    "Rotated",
    "RotatedSegment",
    "Segment",
    "Separable",
    "SeparableSegment",
    "Shadowed",
    "ShadowedSegment",
    "Sparse",
    "SparseSegment",
    "Spec",
    "Summed",
    "SummedSegment",
    "Taking",
    "Thin",
    "ThinSegment",
    "Traits",
    "Uneven",
    "UnevenSegment",
    "dtype_from",
    "format_from",
    "format_to",
    "join",
    "register",
]
