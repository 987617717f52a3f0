"""A service on many devices and machines, with Ray's actors as its instances."""

from neustream.backends.ray.cluster import Cluster
from neustream.backends.ray.kinds import Kind

__all__ = ["Cluster", "Kind"]
