"""Models: loading them, those that come with a package, GGUF files. Knows no cache."""
