"""Bounds of agents: requests of several calls of language models, in a row or side by side."""
