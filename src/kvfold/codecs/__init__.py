"""How the keys and values of a saved cache are coded: fewer bytes on disk and on the wire, none in memory."""

from kvfold.codecs.cachegen import CacheGen
from kvfold.codecs.text import codec_from, codec_to, parse_codec

__all__ = ["CacheGen", "codec_from", "codec_to", "parse_codec"]
