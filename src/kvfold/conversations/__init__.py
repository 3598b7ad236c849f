"""Long conversations in several caches."""
