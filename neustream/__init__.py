"""SLO-aware serving of models that run in steps.

Importing this package imports nothing else: names and submodules are loaded when they are first
asked for, and torch, diffusers, transformers or vllm by the backends that need them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neustream.backends.ray.cluster import Cluster
    from neustream.core.batch import Batch, StepInput
    from neustream.core.events import Emitted, Ended
    from neustream.core.graph import Graph, Stage, loop, seq, switch
    from neustream.core.job import Job
    from neustream.core.kv_cache import KVCache
    from neustream.core.node import CallResult
    from neustream.core.nodes import call, par, tool
    from neustream.core.policies import (
        EDF,
        FCFS,
        POLICIES,
        Clockwork,
        LeastLaxity,
        NeuStream,
        PerModel,
        Priced,
        Serial,
        SlackRanked,
        Static,
        Symphony,
    )
    from neustream.core.policy import Decision, Policy, Pool, View
    from neustream.core.profile import (
        LatencyProfile,
        LinearProfile,
        SumProfile,
        TableProfile,
        UnitProfile,
        largest_batch,
    )
    from neustream.core.scheduler import Scheduler
    from neustream.core.types import SLO, Request
    from neustream.core.work import alone_s
    from neustream.engine.answers import Result
    from neustream.engine.clock import VirtualClock, WallClock
    from neustream.engine.engine import Engine
    from neustream.engine.executor import Executor, ProfiledExecutor, StreamModule, ThreadExecutor
    from neustream.engine.member import Member
    from neustream.engine.report import Report
    from neustream.engine.tools import ToolExecutor
    from neustream.engine.trace import EventLog
    from neustream.errors import (
        BackendError,
        ConfigError,
        GraphError,
        NeustreamError,
        PolicyError,
        ProfileError,
        RequestCancelled,
        RequestDropped,
        RequestError,
        RequestFailed,
        StageFailed,
    )
    from neustream.profiling import load_profile, measure, profiles_of
    from neustream.service.answer import Answer, Outcome
    from neustream.service.mount import Mount
    from neustream.service.service import Service
    from neustream.serving import serve, simulate

__version__ = "0.1.0"

__all__ = [
    "EDF",
    "FCFS",
    "POLICIES",
    "SLO",
    "Answer",
    "BackendError",
    "Batch",
    "CallResult",
    "Clockwork",
    "Cluster",
    "ConfigError",
    "Decision",
    "Emitted",
    "Ended",
    "Engine",
    "EventLog",
    "Executor",
    "Graph",
    "GraphError",
    "Job",
    "KVCache",
    "LatencyProfile",
    "LeastLaxity",
    "LinearProfile",
    "Member",
    "Mount",
    "NeuStream",
    "NeustreamError",
    "Outcome",
    "PerModel",
    "Policy",
    "PolicyError",
    "Pool",
    "Priced",
    "ProfileError",
    "ProfiledExecutor",
    "Report",
    "Request",
    "RequestCancelled",
    "RequestDropped",
    "RequestError",
    "RequestFailed",
    "Result",
    "Scheduler",
    "Serial",
    "Service",
    "SlackRanked",
    "Stage",
    "StageFailed",
    "Static",
    "StepInput",
    "StreamModule",
    "SumProfile",
    "Symphony",
    "TableProfile",
    "ThreadExecutor",
    "ToolExecutor",
    "UnitProfile",
    "View",
    "VirtualClock",
    "WallClock",
    "alone_s",
    "call",
    "largest_batch",
    "load_profile",
    "loop",
    "measure",
    "par",
    "profiles_of",
    "seq",
    "serve",
    "simulate",
    "switch",
    "tool",
]

_HOMES = {
    "neustream.backends.ray.cluster": ("Cluster",),
    "neustream.core.batch": (
        "Batch",
        "StepInput",
    ),
    "neustream.core.events": (
        "Emitted",
        "Ended",
    ),
    "neustream.core.graph": (
        "Graph",
        "Stage",
        "loop",
        "seq",
        "switch",
    ),
    "neustream.core.job": ("Job",),
    "neustream.core.kv_cache": ("KVCache",),
    "neustream.core.node": ("CallResult",),
    "neustream.core.nodes": ("call", "par", "tool"),
    "neustream.core.policies": (
        "EDF",
        "FCFS",
        "POLICIES",
        "Clockwork",
        "LeastLaxity",
        "NeuStream",
        "PerModel",
        "Priced",
        "Serial",
        "SlackRanked",
        "Static",
        "Symphony",
    ),
    "neustream.core.policy": (
        "Decision",
        "Policy",
        "Pool",
        "View",
    ),
    "neustream.core.profile": (
        "LatencyProfile",
        "LinearProfile",
        "SumProfile",
        "TableProfile",
        "UnitProfile",
        "largest_batch",
    ),
    "neustream.core.scheduler": ("Scheduler",),
    "neustream.core.types": (
        "SLO",
        "Request",
    ),
    "neustream.core.work": ("alone_s",),
    "neustream.engine.clock": (
        "VirtualClock",
        "WallClock",
    ),
    "neustream.engine.engine": ("Engine",),
    "neustream.engine.member": ("Member",),
    "neustream.engine.tools": ("ToolExecutor",),
    "neustream.engine.answers": ("Result",),
    "neustream.engine.executor": (
        "Executor",
        "ProfiledExecutor",
        "StreamModule",
        "ThreadExecutor",
    ),
    "neustream.engine.report": ("Report",),
    "neustream.engine.trace": ("EventLog",),
    "neustream.errors": (
        "BackendError",
        "ConfigError",
        "GraphError",
        "NeustreamError",
        "PolicyError",
        "ProfileError",
        "RequestCancelled",
        "RequestDropped",
        "RequestError",
        "RequestFailed",
        "StageFailed",
    ),
    "neustream.profiling": (
        "load_profile",
        "measure",
        "profiles_of",
    ),
    "neustream.service.answer": (
        "Answer",
        "Outcome",
    ),
    "neustream.service.mount": ("Mount",),
    "neustream.service.service": ("Service",),
    "neustream.serving": (
        "serve",
        "simulate",
    ),
}
"""Where the public names are; the same as the imports above, which type checkers and editors read."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, or a submodule, at its first use."""
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
