"""A context's cache in parts, each stored at several levels of quality, and loaded as fast as a budget of time asks."""

from kvfold.streaming.context import Streamed, load_adaptive, save_context

__all__ = ["Streamed", "load_adaptive", "save_context"]
