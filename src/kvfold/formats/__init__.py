"""Formats: how a segment stores its tokens, and how it answers a query over them."""

from kvfold.formats.balanced import BALANCER, Balanced, BalancedSegment
from kvfold.formats.dense import Dense, DenseSegment
from kvfold.formats.depth import Depth, DepthSegment
from kvfold.formats.elite import Basis, Elite, EliteSegment
from kvfold.formats.fp8 import Fp8, Fp8Segment
from kvfold.formats.kinds import KINDS, dtype_from, format_from, format_to
from kvfold.formats.kivi import Kivi, KiviSegment
from kvfold.formats.paged import PagedSegment
from kvfold.formats.rotated import Rotated, RotatedSegment
from kvfold.formats.segment import Format, Segment, Spec, Traits
from kvfold.formats.separable import WEIGHTS, Separable, SeparableSegment
from kvfold.formats.sparse import Sparse, SparseSegment
from kvfold.formats.thin import Thin, ThinSegment
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk, LateChunk, join

__all__ = [
    "BALANCER",
    "KINDS",
    "LOG_MASS",
    "POSITION",
    "WEIGHTS",
    "Balanced",
    "BalancedSegment",
    "Basis",
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
    "Kivi",
    "KiviSegment",
    "LateChunk",
    "PagedSegment",
    "Rotated",
    "RotatedSegment",
    "Segment",
    "Separable",
    "SeparableSegment",
    "Sparse",
    "SparseSegment",
    "Spec",
    "Thin",
    "ThinSegment",
    "Traits",
    "dtype_from",
    "format_from",
    "format_to",
    "join",
]
