"""A config with several models, on one device or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from neustream.config.fields import Factor
from neustream.config.places import check_places, placed
from neustream.config.schema import (
    SWEEPABLE,
    Config,
    Experiment,
    LlmExperiment,
    LlmModel,
    StagesExperiment,
    StagesModel,
    kind_of,
)
from neustream.config.workload import Workload

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,50}$")]
"""It stands in front of the names of stages and requests, with a dot behind."""

PIPELINE, LANGUAGE_MODEL = "a pipeline", "a language model"


def _kind(value: Any) -> str | None:
    if isinstance(value, StagesModel | LlmModel):
        return PIPELINE if isinstance(value, StagesModel) else LANGUAGE_MODEL
    kind = kind_of(value) if isinstance(value, Mapping) else None
    return {StagesExperiment: PIPELINE, LlmExperiment: LANGUAGE_MODEL}.get(kind) if kind else None


AnyModel = Annotated[
    Annotated[StagesModel, Tag(PIPELINE)] | Annotated[LlmModel, Tag(LANGUAGE_MODEL)],
    Discriminator(
        _kind,
        custom_error_type="kind_of_model",
        custom_error_message="give stages (a pipeline) or llm (a language model)",
    ),
]


class ModelsConfig(Config):
    """Several models by name, each with a load of its own; one policy decides for all of them.

    `placement` names the devices of a model; those that it does not name are on all. A device has
    one worker for all of its models. `speed`: the arrivals of all models come so many times as
    fast.
    """

    models: dict[ModelName, AnyModel] = Field(min_length=1)
    placement: dict[str, list[str]] = Field(default_factory=dict)
    speed: Factor = 1.0

    @property
    def sweepable(self) -> list[str]:
        return ["speed", *(f"models.{name}.{key}" for name in self.models for key in SWEEPABLE)]

    @property
    def placed(self) -> dict[str, list[str]]:
        """The models on each device."""
        return placed(self.models, self.device_names, self.placement)

    def experiments(self) -> dict[str, Experiment]:
        """Each model as an experiment of its own, on one device."""
        return {name: self.experiment(name) for name in self.models}

    def experiment(self, name: str) -> Experiment:
        """A model as an experiment of its own, on one device."""
        model = self.models[name]
        kind = StagesExperiment if isinstance(model, StagesModel) else LlmExperiment
        own = {key: getattr(model, key) for key in type(model).model_fields}
        own["workload"] = _faster(model.workload, self.speed)
        return kind(
            name=self.name,
            policies=self.policies,
            simulation=self.simulation,
            cluster=self.cluster,
            **own,
        )

    @model_validator(mode="after")
    def _one_pool(self) -> ModelsConfig:
        for name, model in self.models.items():
            for stage, config in model.stages.items() if isinstance(model, StagesModel) else ():
                if "pool" in config.model_fields_set:
                    where = f"models.{name}.stages.{stage}.pool"
                    raise ValueError(f"{where}: all models of a device share one pool")
        for name, given in self.policies.items():
            if "plan" in given:
                raise ValueError(
                    f"policies.{name}.plan: a plan is of the stages of one model; "
                    "give it in a config with that model alone"
                )
        return self

    @model_validator(mode="after")
    def _one_of_both_places(self) -> ModelsConfig:
        if self.cluster is not None and self.placement:
            raise ValueError("give placement (of devices) or cluster, whose instances name stages, not both")
        return self

    @model_validator(mode="after")
    def _no_truth(self) -> ModelsConfig:
        if self.simulation.truth:
            raise ValueError(
                "simulation.truth: it is of the stages of one model; give it in a config with that model alone"
            )
        return self

    @model_validator(mode="after")
    def _places(self) -> ModelsConfig:
        check_places(self.models, self.device_names, self.placement)
        return self


def _faster(load: Workload, speed: float) -> Workload:
    """A workload whose requests come `speed` times as fast."""
    key = "speed" if load.arrivals == "trace" else "rate" if load.load is None else "load"
    return load if speed == 1 else load.model_copy(update={key: getattr(load, key) * speed})
