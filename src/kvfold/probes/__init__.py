"""What runs a model to learn about it."""
