"""Experiments as YAML files: what is in them, how they are read, and what is said of mistakes."""

from neustream.config.agent import AgentExperiment
from neustream.config.load import experiments_of, load_config, load_experiment
from neustream.config.promises import Slo, SloClass
from neustream.config.schema import (
    SWEEPABLE,
    Config,
    Experiment,
    LlmExperiment,
    Simulation,
    Slowdown,
    StageConfig,
    StagesExperiment,
)
from neustream.config.several import ModelsConfig
from neustream.config.workload import Burst, StepsWorkload, TokensWorkload, Workload

__all__ = [
    "SWEEPABLE",
    "AgentExperiment",
    "Burst",
    "Config",
    "Experiment",
    "LlmExperiment",
    "ModelsConfig",
    "Simulation",
    "Slo",
    "SloClass",
    "Slowdown",
    "StageConfig",
    "StagesExperiment",
    "StepsWorkload",
    "TokensWorkload",
    "Workload",
    "experiments_of",
    "load_config",
    "load_experiment",
]
