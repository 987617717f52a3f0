"""Models of a server's config, from disk or with random weights, ready to be served."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from neustream.by_name import load_object, make_policy
from neustream.core.policy import Policy
from neustream.core.types import SLO
from neustream.engine.clock import WallClock
from neustream.engine.events import Observer
from neustream.errors import BackendError, ConfigError, GraphError, told
from neustream.server.bodies import EditBody, ImageBody
from neustream.server.config import ModelConfig, ServerConfig
from neustream.server.loading import Loaded
from neustream.server.models import BATCH, AgentModel, ImageModel, Model, TextModel
from neustream.server.pictures import fitted
from neustream.service.agents import AgentMount
from neustream.service.mount import Mount
from neustream.service.service import Service


def load(config: ServerConfig, observer: Observer) -> Loaded:
    """A running service of all models that can be had; the others are told of in what it returns.

    BackendError, with why, if there is none; ConfigError for a policy that is none.
    """
    named = policy_of(config)
    policy = make_policy(named.pop("name"), named)
    failed: dict[str, str] = {}
    mounts: dict[str, Mount] = {}
    for model in config.models:
        if model.kind == "vllm":
            continue
        try:
            mounts[model.name] = mount_of(model, failed)
        except Exception as error:  # noqa: BLE001  whatever a library has against a model
            failed[model.name] = told(error)
    clock = WallClock()
    service = _opened(config, mounts, failed, policy, observer)
    fallback = config.promises.fallback_ttft_ms
    places = _places(config, mounts)
    models = {
        model.name: model_of(model.model_copy(update={"device": places[model.name]}), mounts[model.name], fallback)
        for model in config.models
        if model.name in mounts
    }
    for model in config.models:
        if model.kind == "vllm":
            try:
                models[model.name] = _vllm(model, config, service, observer)
            except Exception as error:  # noqa: BLE001  whatever vLLM has against it
                failed[model.name] = told(error)
    if not models:
        raise BackendError("; ".join([_before(name) + why for name, why in failed.items()]))
    known: list[Model] = []
    for model in config.models:
        if model.name in models:
            known += _with_adapters(model, models, mounts, failed)
        else:
            failed |= dict.fromkeys(model.adapters, _before(model.name) + failed[model.name])
    return Loaded(service, known, failed, clock.now())


def _with_adapters(
    config: ModelConfig, models: Mapping[str, Model], mounts: Mapping[str, Any], failed: dict[str, str]
) -> list[Model]:
    """A model, and its adapters as models; those that requests cannot choose move to `failed`."""
    model = models[config.name]
    if not isinstance(model, TextModel) or not config.adapters:
        return [model]
    from neustream.backends.transformers.adapted import to_choose

    inner = to_choose(mounts[config.name].model.adapters, config.adapters, failed)
    return [model, *(replace(model, name=name, adapter=own, base=model.name) for name, own in inner.items())]


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
        return _text(config, {} if failed is None else failed)
    return _image(config) if config.kind == "image" else _agent(config)


def model_of(config: ModelConfig, mount: Mount, fallback_ttft_ms: float) -> Model:
    """What a front has to know of a mount that is being served, as plain data: it may go to another process."""
    makers: Mapping[str, Callable[[ModelConfig, Any, SLO], Model]]
    makers = {"text": _text_model, "image": _image_model, "agent": _agent_model}
    return makers[config.kind](config, mount, config.slo.slo(fallback_ttft_ms))


def _text(config: ModelConfig, failed: dict[str, str]) -> Mount:
    from transformers import AutoConfig, AutoTokenizer

    from neustream.backends.torch import device_of, dtype_of
    from neustream.backends.transformers import TextMount
    from neustream.backends.transformers.adapted import with_adapters
    from neustream.backends.transformers.from_config import Options, build, byte_tokenizer
    from neustream.backends.transformers.processors import class_of, processor_for, processor_in

    if config.path is not None:
        folder = _folder(config.path)
        dtype = dtype_of(config.dtype)
        made = class_of(AutoConfig.from_pretrained(folder, local_files_only=True))
        stock = made.from_pretrained(folder, local_files_only=True, dtype=dtype)
        stock.eval().requires_grad_(False)
    else:
        options = Options(**{"dtype": config.dtype, **(config.backend or {})})
        stock = build(options, device_of(config.device))
    if config.tokenizer == "bytes":
        tokenizer: Any = byte_tokenizer()
        tokenizer.chat_template = BYTES_TEMPLATE
        processor: Any = processor_for(stock, tokenizer)
    elif config.tokenizer is not None:
        processor = AutoTokenizer.from_pretrained(_folder(Path(config.tokenizer)), local_files_only=True)
    elif config.path is not None:
        processor = processor_in(_folder(config.path), stock)
    else:
        raise ConfigError(f"model {config.name!r}: give tokenizer: a folder, or bytes")
    if config.adapters:
        stock, broken = with_adapters(stock, config.adapters)
        failed |= broken
    return TextMount(stock, processor, **{"progress": False, **config.options})


def _text_model(config: ModelConfig, mount: Any, slo: SLO) -> TextModel:
    model = mount.model
    return TextModel(
        config.name,
        mount.tokenizer,
        model.max_len,
        model.vocabulary,
        slo,
        model.slots,
        config.device,
        temperature=mount.defaults.warm,
        see=mount.reader.chat if mount.reader.sees else None,
    )


def _vllm(config: ModelConfig, server: ServerConfig, service: Service | None, observer: Observer) -> Model:
    """A language model in an engine of vLLM's own."""
    from transformers import AutoTokenizer

    from neustream.backends.vllm.served import engine_of

    assert config.path is not None
    folder = str(_folder(config.path))
    where = config.tokenizer or folder
    own, sizes = engine_of(
        folder,
        config.name,
        policy=policy_of(server),
        clock=WallClock() if service is None else service.engine.clock,
        observer=observer,
        options={"dtype": config.dtype, "tokenizer": where, **config.options},
    )
    tokenizer = AutoTokenizer.from_pretrained(_folder(Path(where)), local_files_only=True)
    slo = config.slo.slo(server.promises.fallback_ttft_ms)
    limits = sizes["max_len"], sizes["vocabulary"], slo, sizes["batch"]
    return TextModel(config.name, tokenizer, *limits, own=own)


BYTES_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""The chat template of the tokenizer without files."""


def _image(config: ModelConfig) -> Mount:
    import diffusers

    from neustream.backends.diffusers import PipelineMount, from_config
    from neustream.backends.torch import dtype_of

    if config.path is not None:
        folder, dtype = _folder(config.path), dtype_of(config.dtype)
        made = getattr(diffusers, config.pipeline or "DiffusionPipeline", None)
        if made is None:
            raise ConfigError(f"pipeline: diffusers has none called {config.pipeline!r}")
        pipe: Any = made.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    else:
        options = {"dtype": config.dtype, **(config.backend or {})}
        pipe = from_config.build(from_config.Options(**options))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(config.device)
    known = from_config.call_names(pipe)
    name = type(pipe).__name__
    if "prompt" not in known:
        raise BackendError(f"{name} takes no prompt, so the routes of images cannot ask it")
    samples = [_sample(known, size) for size in _sizes(config, pipe)]
    return PipelineMount(pipe, **{"progress": False, "samples": samples, **config.options})


def _sizes(config: ModelConfig, pipe: Any) -> list[str]:
    """Those that are served; by default the pipeline's own."""
    from neustream.backends.diffusers.from_config import own_size

    return config.sizes or [own_size(pipe)]


def _image_model(config: ModelConfig, mount: Any, slo: SLO) -> ImageModel:
    from neustream.backends.diffusers.from_config import call_names
    from neustream.backends.diffusers.journal import may_move

    pipe = mount.pipe
    name, known, sizes = type(pipe).__name__, frozenset(call_names(pipe)), _sizes(config, pipe)
    return ImageModel(
        config.name,
        sizes,
        ImageArguments(name, known, sizes),
        slo,
        int(config.options.get("max_batch", BATCH)),
        config.device,
        generates="image" not in known or "Kontext" in name,
        edits="image" in known,
        masks="mask_image" in known,
        previews=may_move(pipe) and bool(mount.parts("decode")),
    )


def _sample(known: Mapping[str, Any], size: str) -> dict[str, Any]:
    """The arguments of a call that is measured before anybody is served."""
    from PIL import Image

    pixels = _pixels(size)
    blank = Image.new("RGB", (pixels["width"], pixels["height"]))
    whole = {"prompt": "a lighthouse", "image": blank, "mask_image": blank.convert("L"), **pixels}
    return {name: value for name, value in whole.items() if name in known}


@dataclass(frozen=True)
class ImageArguments:
    """Makes the arguments of a pipeline's call of a body, for its n-th image.

    Args:
        pipeline: the name of its class; known: the arguments of its call; sizes: that are served.
    """

    pipeline: str
    known: Collection[str]
    sizes: Sequence[str]

    def __call__(self, body: ImageBody, number: int, pictures: Mapping[str, Any]) -> dict[str, Any]:
        from neustream.backends.torch import seeded

        size = _size(body, pictures, self.sizes)
        asked: dict[str, Any] = {
            "prompt": body.prompt,
            "negative_prompt": body.negative_prompt,
            "num_inference_steps": body.num_inference_steps,
            "guidance_scale": body.guidance_scale,
            "strength": body.strength if isinstance(body, EditBody) else None,
        }
        if body.seed is not None:
            asked["generator"] = seeded((body.seed + number) % 2**63, "cpu")
        given = {name: value for name, value in asked.items() if value is not None}
        for name in given:
            if name not in self.known:
                raise ValueError(f"{self.pipeline} takes no {name}")
        pixels = {name: value for name, value in _pixels(size).items() if name in self.known}
        return {**given, **pixels, **_fitted(pictures, size)}


def _size(body: ImageBody, pictures: Mapping[str, Any], sizes: Sequence[str]) -> str:
    """The size of an answer: as asked, else that of the picture if it is served, else the model's first."""
    if body.pixels is not None:
        assert body.size is not None
        return body.size
    own = [f"{one.width}x{one.height}" for one in pictures.values()]
    return next((size for size in own if size in sizes), sizes[0])


def _fitted(pictures: Mapping[str, Any], size: str) -> dict[str, Any]:
    """The pictures of an edit as arguments of a call, in the size of the answer."""
    pixels = _pixels(size)
    side = pixels["width"], pixels["height"]
    names = {"image": ("image", "RGB"), "mask": ("mask_image", "L")}
    return {names[name][0]: fitted(picture, side, names[name][1]) for name, picture in pictures.items()}


def _pixels(size: str) -> dict[str, int]:
    width, _, height = size.partition("x")
    return {"width": int(width), "height": int(height)}


def _agent(config: ModelConfig) -> Mount:
    assert config.graph is not None
    params_of(config)  # says what is none before anything is opened
    return AgentMount(load_object(config.graph, "graph"))


def _agent_model(config: ModelConfig, mount: Any, slo: SLO) -> AgentModel:
    return AgentModel(config.name, params_of(config), slo, device=config.device)


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


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise BackendError(f"{str(path)!r} is no folder")
    return path
