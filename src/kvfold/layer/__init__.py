"""One attention layer: what it has read, what is stored of that, and how a method decides about it."""
