"""Bounds of generations of one language model, each of whose outputs has a deadline."""
