"""The spatial level: which stages on which devices, how many of each, from profiles and load."""

from neustream.cluster.planning.charges import Charges
from neustream.cluster.planning.placement import Device, Needs, Placement
from neustream.cluster.planning.planner import Candidate, Plan, Settings, plan

__all__ = ["Candidate", "Charges", "Device", "Needs", "Placement", "Plan", "Settings", "plan"]
