"""The only room that knows transformers' caches: the cache, its layers, the attention functions."""
