"""A service on many devices and machines, with Ray's actors as its instances."""

from neustream.backends.ray.cluster import Cluster

__all__ = ["Cluster"]
