"""The kinds of models that an experiment may have: a pipeline of stages, or a language model."""

from __future__ import annotations

from neustream.config.agent import AgentExperiment
from neustream.config.schema import Experiment, LlmExperiment, StagesExperiment
from neustream.experiment.pipelines.agent import AgentPipeline
from neustream.experiment.pipelines.base import Pipeline
from neustream.experiment.pipelines.llm import LlmPipeline
from neustream.experiment.pipelines.stages import StagesPipeline

__all__ = ["AgentPipeline", "LlmPipeline", "Pipeline", "StagesPipeline", "pipeline_of"]


def pipeline_of(
    experiment: Experiment, prefix: str = ""
) -> StagesPipeline | LlmPipeline | AgentPipeline:
    """The model of an experiment, its names with `prefix` in front."""
    if isinstance(experiment, StagesExperiment):
        return StagesPipeline(experiment, prefix)
    if isinstance(experiment, LlmExperiment):
        return LlmPipeline(experiment, prefix)
    if isinstance(experiment, AgentExperiment):
        return AgentPipeline(experiment, prefix)
    raise TypeError(f"{type(experiment).__name__} is no kind of experiment")
