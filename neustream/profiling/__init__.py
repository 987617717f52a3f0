"""Latency profiles: measured on stream modules, kept as files."""

from neustream.profiling.files import Measurement, load_profile, load_stage, save
from neustream.profiling.measuring import (
    default_batches,
    measure,
    processor,
    profiles_of,
    versions,
)

__all__ = [
    "Measurement",
    "default_batches",
    "load_profile",
    "load_stage",
    "measure",
    "processor",
    "profiles_of",
    "save",
    "versions",
]
