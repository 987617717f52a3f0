"""Experiments made ready and run: graph, requests, policies and engine of a config."""

from neustream.experiment.policies import build_policy
from neustream.experiment.running import (
    Prepared,
    build_graph,
    build_pools,
    load_profiles,
    merge,
    prepare,
    record,
    serve,
    simulate,
    sweep_points,
)

__all__ = [
    "Prepared",
    "build_graph",
    "build_policy",
    "build_pools",
    "load_profiles",
    "merge",
    "prepare",
    "record",
    "serve",
    "simulate",
    "sweep_points",
]
