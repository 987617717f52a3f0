"""Experiments made ready and run: graph, requests, policies and engine of a config."""

from neustream.experiment.pipelines import LlmPipeline, Pipeline, StagesPipeline, pipeline_of
from neustream.experiment.policies import build_policy
from neustream.experiment.prepared import Prepared, merge, prepare
from neustream.experiment.running import (
    ByModel,
    record,
    simulate,
    sweep_points,
)

__all__ = [
    "ByModel",
    "LlmPipeline",
    "Pipeline",
    "Prepared",
    "StagesPipeline",
    "build_policy",
    "merge",
    "pipeline_of",
    "prepare",
    "record",
    "simulate",
    "sweep_points",
]
