"""`neustream serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from neustream.config.messages import explain
from neustream.config.yaml_file import read_document
from neustream.errors import BackendError, ConfigError
from neustream.server.config import HttpConfig, ModelConfig, ServerConfig


def command(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The server's YAML file.")] = None,
    model: Annotated[Path | None, typer.Option(help="In its place: the folder of one model.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="In its place: a tiny random text model, and images.")] = False,
    host: Annotated[str | None, typer.Option(help="Where to listen; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: any free one.")] = None,
    policy: Annotated[str | None, typer.Option("--policy", "-p", help="Who runs next.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line; one has to come along.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without a key.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it could run.")] = False,
) -> None:
    """Serve models over HTTP: OpenAI's routes, with promises."""
    try:
        from neustream.server.lifecycle import check_tracing, leave, run
    except ImportError as error:
        raise BackendError(f"{error.name} is not here: pip install 'neustream[serve]'") from None
    settings = _config(config, model, demo)
    http = {"host": host, "port": port, "api_key_file": api_key_file}
    given = {name: value for name, value in http.items() if value is not None}
    merged = HttpConfig.model_validate({**settings.http.model_dump(), **given})
    update: dict[str, Any] = {"http": merged}
    if policy is not None:
        update["policy"] = policy
    settings = settings.model_copy(update=update)
    keys = _keys(merged.api_key_file)
    local = merged.host in ("127.0.0.1", "localhost", "::1")
    if not local and not keys and not insecure:
        raise ConfigError(f"host {merged.host!r} is not only this machine: give --api-key-file, or --insecure")
    if check:
        check_tracing(settings.observe.otel_endpoint)
        return
    from neustream.backends.loading import load

    leave(asyncio.run(run(settings, lambda metrics: load(settings, metrics), keys, _say)))


def _say(line: str) -> None:
    typer.echo(line)


def _config(path: Path | None, model: Path | None, demo: bool) -> ServerConfig:
    """What is to be served; ConfigError unless it is said in one way."""
    if [path is not None, model is not None, demo].count(True) != 1:
        raise ConfigError("give a CONFIG, --model, or --demo")
    if demo:
        return _demo()
    if model is not None:
        kind: Any = "image" if (model / "model_index.json").exists() else "text"
        known = "".join(c if c.isalnum() or c in "._-" else "-" for c in model.resolve().name)
        name = known.strip("._-") or "model"
        return ServerConfig(models=[ModelConfig(name=name, kind=kind, path=model)])
    assert path is not None
    document = read_document(path)
    try:
        found = ServerConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, ServerConfig, document.lines)}") from None
    return found.model_copy(update={"models": [_beside(path, each) for each in found.models]})


def _beside(path: Path, model: ModelConfig) -> ModelConfig:
    """Paths in a config are relative to its folder."""
    update: dict[str, Any] = {}
    if model.path is not None:
        update["path"] = path.parent / model.path
    if model.tokenizer not in (None, "bytes"):
        update["tokenizer"] = str(path.parent / str(model.tokenizer))
    return model.model_copy(update=update)


def _demo() -> ServerConfig:
    from neustream.backends.demo import IMAGE, TEXT

    text = ModelConfig(
        name="tiny-text",
        kind="text",
        backend=TEXT,
        tokenizer="bytes",
        options={"measure_s": 3.0, "slots": 8},
    )
    image = ModelConfig(name="tiny-image", kind="image", backend=IMAGE, options={"measure_s": 3.0})
    return ServerConfig(models=[text, image])


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: {error}") from None
    if not lines:
        raise ConfigError(f"--api-key-file {path}: no key in it")
    return lines
