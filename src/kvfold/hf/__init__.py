"""The only room that knows transformers: the cache, the attention functions, RoPE, models."""
