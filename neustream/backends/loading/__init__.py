"""Models of a server's config, from disk or with random weights, ready to be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neustream.backends.loading.agents import agent_model, agent_mount
from neustream.backends.loading.images import image_model, image_mount
from neustream.backends.loading.texts import adapters_of, text_model, text_mount, vllm_model
from neustream.by_name import make_policy
from neustream.core.policy import Policy
from neustream.core.types import SLO
from neustream.engine.clock import WallClock
from neustream.engine.events import Observer
from neustream.errors import BackendError, GraphError, told
from neustream.server.config import ModelConfig, ServerConfig
from neustream.server.loading import Loaded
from neustream.server.models import Model
from neustream.service.mount import Mount
from neustream.service.service import Service


def load(config: ServerConfig, observer: Observer) -> Loaded:
    """A running service of all models that can be had; the others are told of in what it returns.

    BackendError, with why, if there is none; ConfigError for a policy that is none.
    """
    named = policy_of(config)
    policy = make_policy(named.pop("name"), named)
    failed: dict[str, str] = {}
    mounts = _mounts(config, failed)
    clock = WallClock()
    service = _opened(config, mounts, failed, policy, observer)
    models = _models(config, mounts, failed, service, observer)
    if not models:
        raise BackendError("; ".join([_before(name) + why for name, why in failed.items()]))
    known: list[Model] = []
    for model in config.models:
        if model.name in models:
            known += [models[model.name], *adapters_of(model, models[model.name], mounts.get(model.name), failed)]
        else:
            failed |= dict.fromkeys(model.adapters, _before(model.name) + failed[model.name])
    return Loaded(service, known, failed, clock.now())


def _mounts(config: ServerConfig, failed: dict[str, str]) -> dict[str, Mount]:
    """Those that can be loaded, but for models of vLLM; the others move to `failed`."""
    mounts: dict[str, Mount] = {}
    for model in config.models:
        if model.kind == "vllm":
            continue
        try:
            mounts[model.name] = mount_of(model, failed)
        except Exception as error:  # noqa: BLE001  whatever a library has against a model
            failed[model.name] = told(error)
    return mounts


def _models(
    config: ServerConfig,
    mounts: Mapping[str, Mount],
    failed: dict[str, str],
    service: Service | None,
    observer: Observer,
) -> dict[str, Model]:
    """What is served by the service, and by engines of vLLM's own; what vLLM cannot load moves to `failed`."""
    places = _places(config, mounts)
    fallback = config.promises.fallback_ttft_ms
    models: dict[str, Model] = {}
    for model in config.models:
        if model.name in mounts:
            there = model.model_copy(update={"device": places[model.name]})
            models[model.name] = model_of(there, mounts[model.name], fallback)
        elif model.kind == "vllm":
            clock = WallClock() if service is None else service.engine.clock
            try:
                models[model.name] = vllm_model(model, policy_of(config), clock, observer, fallback)
            except Exception as error:  # noqa: BLE001  whatever vLLM has against it
                failed[model.name] = told(error)
    return models


def policy_of(config: ServerConfig) -> dict[str, Any]:
    """The policy's `name` and its parameters."""
    chosen = config.policy if isinstance(config.policy, Mapping) else {"name": config.policy}
    return {"name": "default", **chosen}


def _opened(
    config: ServerConfig,
    mounts: dict[str, Mount],
    failed: dict[str, str],
    policy: Policy,
    observer: Observer,
) -> Service | None:
    """A service of those that can be opened; the others move to `failed`. None if there is none."""
    places = _places(config, mounts)
    while mounts:
        try:
            return service_of(config, mounts, places, policy, [observer])
        except (BackendError, GraphError) as error:
            name = _whose(error, mounts)
            failed[name] = str(error).removeprefix(_before(name))
            del mounts[name]
    return None


def _places(config: ServerConfig, mounts: Mapping[str, Mount]) -> dict[str, str]:
    """The device of each model; an agent that names none is with the first of the others."""
    known = [model for model in config.models if model.name in mounts]
    first = next((model.device for model in known if model.kind != "agent"), "cpu")
    follows = {model.name for model in known if model.kind == "agent" and "device" not in model.model_fields_set}
    return {model.name: first if model.name in follows else model.device for model in known}


def service_of(
    config: ServerConfig,
    mounts: Mapping[str, Mount],
    places: Mapping[str, str],
    policy: Policy,
    observers: Sequence[Observer],
) -> Service:
    """A running service of mounts, each on the device that `places` says."""
    alone = len(mounts) == 1
    first = places[next(iter(mounts))]
    return Service(
        {"": next(iter(mounts.values()))} if alone else mounts,
        placement=None if alone else {name: [places[name]] for name in mounts},
        devices=[first] if alone else None,
        policy=policy,
        max_open=config.limits.max_open,
        step_timeout_s=config.step_timeout_s,
        observers=observers,
    )


def _before(name: str) -> str:
    """What a service says in front of what is wrong with a model."""
    return f"model {name!r}: "


def _whose(error: BackendError | GraphError, mounts: Mapping[str, Mount]) -> str:
    """The model that a service could not be opened for; raises the error if that is none's."""
    if len(mounts) == 1:
        return next(iter(mounts))
    for name in mounts:
        if str(error).startswith(_before(name)):
            return name
    raise error


def mount_of(config: ModelConfig, failed: dict[str, str] | None = None) -> Mount:
    """A model, ready to be served; whatever a library has against it is raised as it is.

    `failed` gets adapters of it that cannot be loaded, with why.
    """
    if config.kind == "text":
        return text_mount(config, {} if failed is None else failed)
    return image_mount(config) if config.kind == "image" else agent_mount(config)


def model_of(config: ModelConfig, mount: Mount, fallback_ttft_ms: float) -> Model:
    """What a front has to know of a mount that is being served, as plain data: it may go to another process."""
    makers: Mapping[str, Callable[[ModelConfig, Any, SLO], Model]]
    makers = {"text": text_model, "image": image_model, "agent": agent_model}
    return makers[config.kind](config, mount, config.slo.slo(fallback_ttft_ms))
