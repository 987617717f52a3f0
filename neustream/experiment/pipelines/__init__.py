"""The kinds of models that an experiment may have: a pipeline of stages, or a language model."""

from __future__ import annotations

from neustream.config.schema import Experiment, LlmExperiment, StagesExperiment
from neustream.experiment.pipelines.base import Pipeline
from neustream.experiment.pipelines.llm import LlmPipeline
from neustream.experiment.pipelines.stages import StagesPipeline

__all__ = ["LlmPipeline", "Pipeline", "StagesPipeline", "pipeline_of"]


def pipeline_of(experiment: Experiment, prefix: str = "") -> StagesPipeline | LlmPipeline:
    """The model of an experiment, its names with `prefix` in front."""
    if isinstance(experiment, StagesExperiment):
        return StagesPipeline(experiment, prefix)
    if isinstance(experiment, LlmExperiment):
        return LlmPipeline(experiment, prefix)
    raise TypeError(f"{type(experiment).__name__} is no kind of experiment")
