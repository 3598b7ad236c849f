"""The only room that knows transformers: the cache, the attention functions, RoPE, models."""

from kvfold.hf import copying

__all__ = ["copying"]
