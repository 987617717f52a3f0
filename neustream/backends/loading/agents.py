"""Agents of a server's config."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from neustream.by_name import load_object
from neustream.core.types import SLO
from neustream.errors import ConfigError, told
from neustream.server.config import ModelConfig
from neustream.server.models import AgentModel
from neustream.service.agents import AgentMount
from neustream.service.mount import Mount


def agent_mount(config: ModelConfig) -> Mount:
    """A graph that calls the other models."""
    assert config.graph is not None
    params_of(config)  # says what is none before anything is opened
    return AgentMount(load_object(config.graph, "graph"))


def agent_model(config: ModelConfig, mount: Any, slo: SLO) -> AgentModel:
    """What a front has to know of it."""
    return AgentModel(config.name, params_of(config), slo, device=config.device, ends_in=mount.ends_in)


def params_of(config: ModelConfig) -> type[BaseModel] | None:
    """What checks the parameters of an agent's runs, None where the config names nothing.

    Raises:
        ConfigError: it is no pydantic model, or one without a JSON schema, which /v1/models tells.
    """
    if config.params is None:
        return None
    found = load_object(config.params, "params")
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ConfigError(f"params {config.params!r}: no pydantic model")
    try:
        found.model_json_schema()
    except Exception as error:
        raise ConfigError(f"params {config.params!r}: it has no JSON schema: {told(error)}") from error
    return found
