"""Bounds of requests to graphs whose calls are known in advance and have no sizes."""
