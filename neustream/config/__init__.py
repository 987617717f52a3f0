"""Experiments as YAML files: what is in them, how they are read, and what is said of mistakes."""

from neustream.config.schema import (
    SWEEPABLE,
    Burst,
    Experiment,
    Simulation,
    Slo,
    SloClass,
    Slowdown,
    StageConfig,
    Workload,
    load_experiment,
)

__all__ = [
    "SWEEPABLE",
    "Burst",
    "Experiment",
    "Simulation",
    "Slo",
    "SloClass",
    "Slowdown",
    "StageConfig",
    "Workload",
    "load_experiment",
]
