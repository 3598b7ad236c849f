"""Formats: how a segment stores its tokens, and how it answers a query over them."""

from kvfold.formats.dense import Dense, DenseSegment
from kvfold.formats.segment import LOG_MASS, POSITION, Chunk, Format, LateChunk, Segment, join

__all__ = ["LOG_MASS", "POSITION", "Chunk", "Dense", "DenseSegment", "Format", "LateChunk", "Segment", "join"]
