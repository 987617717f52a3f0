"""llm-d-benchmark's workload profiles: read in the dialects of the tools that they are for."""

from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.profile import Load, Profile, Sweep
from neustream.bench.profiles.reading import Given, read_profile

__all__ = ["Given", "Load", "Profile", "Sweep", "Unrunnable", "read_profile"]
