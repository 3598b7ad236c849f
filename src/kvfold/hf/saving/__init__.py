"""A cache as a file, and what such a file must have in common with the model that reads it."""
