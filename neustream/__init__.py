"""SLO-aware serving of models that run in steps.

Importing this package pulls in no torch, diffusers, transformers or vllm: backends load them when
they are used.
"""

from neustream.core.batch import Batch
from neustream.core.graph import Graph, Stage, loop, seq, switch
from neustream.core.job import Job
from neustream.core.policies import (
    EDF,
    FCFS,
    POLICIES,
    Clockwork,
    LeastLaxity,
    NeuStream,
    Priced,
    Serial,
    SlackRanked,
    Static,
    Symphony,
)
from neustream.core.policy import Decision, Policy, Pool, View
from neustream.core.profile import LatencyProfile, LinearProfile, SumProfile, TableProfile, UnitProfile, largest_batch
from neustream.core.scheduler import Scheduler
from neustream.core.types import SLO, Request
from neustream.core.work import alone_s
from neustream.engine.clock import VirtualClock, WallClock
from neustream.engine.engine import Engine, Result
from neustream.engine.executor import Executor, ProfiledExecutor, StreamModule, ThreadExecutor
from neustream.engine.report import Report
from neustream.engine.trace import EventLog
from neustream.errors import (
    BackendError,
    ConfigError,
    GraphError,
    NeustreamError,
    PolicyError,
    ProfileError,
    RequestError,
    StageFailed,
)
from neustream.profiling import load_profile, measure, profiles_of
from neustream.serving import serve, simulate

__version__ = "0.1.0"

__all__ = [
    "EDF",
    "FCFS",
    "POLICIES",
    "SLO",
    "BackendError",
    "Batch",
    "Clockwork",
    "ConfigError",
    "Decision",
    "Engine",
    "EventLog",
    "Executor",
    "Graph",
    "GraphError",
    "Job",
    "LatencyProfile",
    "LeastLaxity",
    "LinearProfile",
    "NeuStream",
    "NeustreamError",
    "Policy",
    "PolicyError",
    "Pool",
    "Priced",
    "ProfileError",
    "ProfiledExecutor",
    "Report",
    "Request",
    "RequestError",
    "Result",
    "Scheduler",
    "Serial",
    "SlackRanked",
    "Stage",
    "StageFailed",
    "Static",
    "StreamModule",
    "SumProfile",
    "Symphony",
    "TableProfile",
    "ThreadExecutor",
    "UnitProfile",
    "View",
    "VirtualClock",
    "WallClock",
    "alone_s",
    "largest_batch",
    "load_profile",
    "loop",
    "measure",
    "profiles_of",
    "seq",
    "serve",
    "simulate",
    "switch",
]
