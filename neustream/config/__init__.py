"""Experiments as YAML files: what is in them, how they are read, and what is said of mistakes."""

from neustream.config.load import load_experiment
from neustream.config.promises import Slo, SloClass
from neustream.config.schema import (
    SWEEPABLE,
    Experiment,
    LlmExperiment,
    Simulation,
    Slowdown,
    StageConfig,
    StagesExperiment,
)
from neustream.config.workload import Burst, StepsWorkload, TokensWorkload, Workload

__all__ = [
    "SWEEPABLE",
    "Burst",
    "Experiment",
    "LlmExperiment",
    "Simulation",
    "Slo",
    "SloClass",
    "Slowdown",
    "StageConfig",
    "StagesExperiment",
    "StepsWorkload",
    "TokensWorkload",
    "Workload",
    "load_experiment",
]
