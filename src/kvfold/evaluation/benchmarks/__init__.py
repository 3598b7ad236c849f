"""Public benchmarks in the formats that they are published in, from a path or from the Hugging Face hub."""
