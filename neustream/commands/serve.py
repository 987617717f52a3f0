"""`neustream serve`."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neustream.backends.ray.cluster import check_ray
from neustream.backends.ray.configs import check as check_cluster
from neustream.commands.options import SetOption
from neustream.commands.serve_config import Source, check_models, keys_of, policy_of, settings_of
from neustream.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neustream.server.config import ServerConfig
    from neustream.server.loading import Loaded
    from neustream.server.metrics import Metrics

PREFIX = "NEUSTREAM_"
"""Options but --demo, --set and --check are read from the environment too."""
DEMO = "neustream-demo-"
"""How the folder is called in which a demo keeps what it measured, until it ends."""


def _option(name: str, text: str, **more: Any) -> Any:
    """An option, and the variable of the environment that stands for it."""
    variable = PREFIX + name.strip("-").replace("-", "_").upper()
    names = [each for each in (name, more.pop("short", None)) if each is not None]
    return typer.Option(*names, help=text, envvar=variable, show_envvar=False, **more)


SECONDS: dict[str, Any] = {"metavar": "S"}
MS: dict[str, Any] = {"metavar": "MS"}


def command(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The server's YAML file.")] = None,
    model: Annotated[Path | None, _option("--model", "In its place: the folder of one model.")] = None,
    tokenizer: Annotated[str | None, _option("--tokenizer", "Of --model: another folder, or bytes.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="In its place: a tiny random text model, and images.")] = False,
    host: Annotated[str | None, _option("--host", "Where to listen; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, _option("--port", "0: any free one.", min=0, max=65535)] = None,
    uds: Annotated[Path | None, _option("--uds", "In their place: a socket of this machine.")] = None,
    policy: Annotated[str | None, _option("--policy", "Who runs next.", short="-p")] = None,
    slo_ttft_ms: Annotated[float | None, _option("--slo-ttft-ms", "Promised where nothing is said.", **MS)] = None,
    slo_tpot_ms: Annotated[float | None, _option("--slo-tpot-ms", "The same.", **MS)] = None,
    slo_e2e_ms: Annotated[float | None, _option("--slo-e2e-ms", "The same.", **MS)] = None,
    api_key: Annotated[list[str] | None, _option("--api-key", "One has to come along; several are possible.")] = None,
    api_key_file: Annotated[Path | None, _option("--api-key-file", "A file of them, one a line.")] = None,
    open_metrics: Annotated[bool | None, _option("--open-metrics", "/metrics needs no key.")] = None,
    insecure: Annotated[bool, _option("--insecure", "Listen beyond this machine without a key.")] = False,
    allowed_host: Annotated[list[str] | None, _option("--allowed-host", "A name that may be asked for.")] = None,
    cors_origin: Annotated[list[str] | None, _option("--cors-origin", "Its pages may ask.")] = None,
    allow_new_sizes: Annotated[bool | None, _option("--allow-new-sizes", "Images of any size.")] = None,
    max_wait: Annotated[float | None, _option("--max-wait", "Who would wait longer is refused.", **SECONDS)] = None,
    head_after: Annotated[float | None, _option("--head-after", "Streams begin by then.", **SECONDS)] = None,
    sse_keepalive: Annotated[float | None, _option("--sse-keepalive", "Comments in streams.", **SECONDS)] = None,
    pre_drain: Annotated[float | None, _option("--pre-drain", "Take new work so long.", **SECONDS)] = None,
    shutdown_timeout: Annotated[float | None, _option("--shutdown-timeout", "Then cancel.", **SECONDS)] = None,
    access_log: Annotated[str | None, _option("--access-log", "json: a line for each request.")] = None,
    set_: SetOption = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it could run.")] = False,
) -> None:
    """Serve models over HTTP: OpenAI's routes, with promises.

    Options that are not given are read from NEUSTREAM_HOST, NEUSTREAM_API_KEY and so on.
    """
    try:
        from neustream.server.lifecycle import leave, spare_memory
    except ImportError as error:
        raise BackendError(f"{error.name} is not here: pip install 'neustream[serve]'") from None
    spare_memory()
    slo = {"ttft_ms": slo_ttft_ms, "tpot_ms": slo_tpot_ms, "e2e_ms": slo_e2e_ms}
    given = {
        "policy": policy,
        "http.host": host,
        "http.port": port,
        "http.uds": None if uds is None else str(uds.absolute()),
        "http.api_key_file": None if api_key_file is None else str(api_key_file.absolute()),
        "http.open_metrics": open_metrics,
        "http.allowed_hosts": allowed_host or None,
        "http.cors_origins": cors_origin or None,
        "http.head_after_s": head_after,
        "http.sse_keepalive_s": sse_keepalive,
        "http.pre_drain_s": pre_drain,
        "http.shutdown_timeout_s": shutdown_timeout,
        "limits.max_wait_s": max_wait,
        "limits.allow_new_sizes": allow_new_sizes,
        "observe.access_log": access_log,
    }
    with contextlib.ExitStack() as kept:
        cache = kept.enter_context(TemporaryDirectory(prefix=DEMO, ignore_cleanup_errors=True)) if demo else None
        settings = settings_of(Source(config, model, demo, tokenizer, cache), given, slo, set_ or ())
        code = _serve(settings, api_key or (), say_of_demo if demo else _say, insecure=insecure, check=check)
    leave(code)


def _serve(
    settings: ServerConfig, api_key: Sequence[str], say: Callable[[str], None], *, insecure: bool, check: bool
) -> int:
    """Serve until a signal, the exit code; `check`: only say what is wrong."""
    from neustream.server.lifecycle import check_tracing, run

    keys = keys_of(settings.http.api_key_file, api_key)
    if not settings.http.local and not keys and not insecure:
        where = settings.http.host
        raise ConfigError(f"host {where!r} is not only this machine: give --api-key, --api-key-file, or --insecure")
    policy_of(settings)
    if settings.cluster is not None:
        check_cluster(settings.cluster)
        check_ray()
    if check:
        check_models(settings)
        check_tracing(settings.observe.otel_endpoint)
        return 0
    return asyncio.run(run(settings, partial(_load, settings), keys, say))


def _load(settings: ServerConfig, metrics: Metrics) -> Loaded:
    """The models of a config, in this process or on the instances of a cluster."""
    from neustream.server.lifecycle import keep_still

    if settings.cluster is None:
        from neustream.backends.loading import load

        loaded = load(settings, metrics)
    else:
        from neustream.backends.ray import front

        loaded = front.load(settings, metrics)
    keep_still()
    return loaded


def _say(line: str) -> None:
    typer.echo(line)


def say_of_demo(line: str) -> None:
    """The same, and what a newcomer may try, on stderr."""
    _say(line)
    url = line.removeprefix("serving on ")
    if url.startswith("http"):
        asked = '{"prompt": "Once upon a time"}'
        notes = ["loading and measuring two tiny random models; once they are ready, try", ""]
        notes += [f"    curl {url}/v1/completions -H 'content-type: application/json' -d '{asked}'", ""]
        typer.echo("\n".join([*notes, f"and see {url}/ui in a browser"]), err=True)
