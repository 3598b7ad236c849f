"""One call of a model: what belongs to it, the hooks that begin and end it, and what they change of it."""
