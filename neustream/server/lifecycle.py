"""One process: it listens while it loads, drains on a signal, and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from neustream.core.policy import Policy
from neustream.engine.clock import WallClock
from neustream.errors import BackendError, NeustreamError
from neustream.server.app import build_app
from neustream.server.config import ServerConfig
from neustream.server.gateway import LOADING, Gateway, Loaded
from neustream.server.metrics import Metrics
from neustream.server.wire import SLOW

if TYPE_CHECKING:
    from neustream.server.observe.tracing import Tracer

log = logging.getLogger("neustream.server")

CUT = "ASGI callable returned without completing response"
"""What uvicorn says of streams that we cut on purpose."""
LOOK_S = 0.1
"""How often it is seen whether all that was open has ended, and whether the engine lives."""
LARGEST_HEAD = 65_536


class Server(uvicorn.Server):
    """uvicorn, but for signals: the first one lets what is open be served.

    Args:
        drain: told of the first signal, on the event loop.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._signals = 0
        self.code = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain; a second one: end at once."""
        self._signals += 1
        if self._signals == 1:
            asyncio.get_event_loop().call_soon_threadsafe(self._drain)
            return
        self.code = 128 + sig
        self.force_exit = self.should_exit = True


class Protocol(H11Protocol):
    """HTTP/1.1 whose heads have to come in time, and whose clients have to read in time.

    Args:
        most: connections at once; more are closed.
    """

    def __init__(self, head_timeout_s: float, write_timeout_s: float, most: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most
        self._head_timeout_s = head_timeout_s
        self._write_timeout_s = write_timeout_s
        self._blocked: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        if len(self.connections) > self._most:
            transport.close()
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._head is None:
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._blocked = self.loop.call_later(self._write_timeout_s, self._unread)

    def resume_writing(self) -> None:
        self._go_on()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._go_on()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._head = self.loop.call_later(self._head_timeout_s, self._late)

    def _stop(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _go_on(self) -> None:
        if self._blocked is not None:
            self._blocked.cancel()
            self._blocked = None

    def _unread(self) -> None:
        """The client takes nothing: what it has asked for ends, and so does the connection."""
        if self.scope is not None:
            self.scope.setdefault("state", {})[SLOW] = True
        self.transport.abort()

    def _late(self) -> None:
        """Half a head, or none: nobody is served by this connection."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def _listening(host: str, port: int) -> socket.socket:
    """A socket there; BackendError if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise BackendError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


class _NotOurs(logging.Filter):
    """Leaves out what uvicorn says of streams that were cut on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        return CUT not in record.getMessage()


async def run(
    config: ServerConfig,
    load: Callable[[Metrics], Loaded],
    keys: Sequence[str] = (),
    say: Callable[[str], None] = print,
    stop: asyncio.Event | None = None,
) -> int:
    """Serve until a signal, or until `stop` is set; the exit code.

    `load` makes the service, on a thread; the metrics are to observe it.
    """
    metrics = Metrics([model.name for model in config.models])
    tracer = tracer_of(config.observe.otel_endpoint)
    if tracer is not None:
        metrics.follow(tracer)
    gateway = Gateway(config.limits, metrics.tell)
    app = build_app(gateway, config, metrics, keys)
    http = config.http
    sock = _listening(http.host, http.port)
    drained = asyncio.Event() if stop is None else stop
    logging.getLogger("uvicorn.error").addFilter(_NotOurs())
    server = Server(
        uvicorn.Config(
            app,
            http=partial(Protocol, http.head_timeout_s, http.write_timeout_s, 2 * config.limits.max_open),  # type: ignore[arg-type]
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=int(http.keep_alive_s),
            h11_max_incomplete_event_size=LARGEST_HEAD,
        ),
        drained.set,
    )
    gateway.connections = lambda: len(server.server_state.connections)
    serving = asyncio.ensure_future(server.serve([sock]))
    pulse = asyncio.ensure_future(metrics.pulse())
    port = sock.getsockname()[1]
    host = f"[{http.host}]" if ":" in http.host else http.host
    say(f"serving on http://{host}:{port}")
    try:
        await _until_drained(
            gateway,
            lambda: _loaded(load, metrics),
            drained,
            serving,
            say,
            exit_on_death=config.exit_on_engine_death,
        )
    except NeustreamError:
        server.code = 1
        raise
    except Exception:
        log.exception("the server failed")
        server.code = 1
    finally:
        await _end(gateway, server, serving, http.shutdown_timeout_s)
        pulse.cancel()
        if tracer is not None:
            metrics.fold()
            await asyncio.get_running_loop().run_in_executor(None, tracer.close)
    return server.code


def tracer_of(endpoint: str | None) -> Tracer | None:
    """What traces requests, if that is asked for; errors as of `check_tracing`."""
    check_tracing(endpoint)
    if endpoint is None:
        return None
    from neustream.server.observe.tracing import exporting

    return exporting(endpoint)


def check_tracing(endpoint: str | None) -> None:
    """BackendError if tracing is asked for, and the extra for it is not here."""
    if endpoint is None:
        return
    try:
        from neustream.server.observe import tracing  # noqa: F401
    except ImportError as error:
        raise BackendError(f"otel_endpoint: {error.name} is not here: pip install 'neustream[otel]'") from None


def _loaded(load: Callable[[Metrics], Loaded], metrics: Metrics) -> Loaded:
    """The models, with how long they took."""
    clock = WallClock()
    loaded = load(metrics)
    kinds = sorted({model.kind for model in loaded.models})
    rules = {type(rule).__name__ for rule in _policies(loaded)}
    if loaded.service is not None:
        metrics.serves(loaded.service.engine.clock)
    metrics.loaded(clock.now(), loaded.warmup_s, "+".join(kinds), "+".join(sorted(rules)))
    return loaded


def _policies(loaded: Loaded) -> list[Policy]:
    """The policies of all members."""
    members = () if loaded.service is None else loaded.service.engine.members
    return [rule for member in members for rule in member.scheduler.policies.values()]


async def _until_drained(
    gateway: Gateway,
    load: Callable[[], Loaded],
    drained: asyncio.Event,
    serving: asyncio.Future[Any],
    say: Callable[[str], None],
    *,
    exit_on_death: bool,
) -> None:
    """Load, then wait for a signal, or until no engine lives. A signal does not wait for the load."""
    loading: asyncio.Future[Any] = asyncio.ensure_future(gateway.load(load))
    signalled: asyncio.Future[Any] = asyncio.ensure_future(drained.wait())
    await asyncio.wait({loading, signalled, serving}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return
    loading.result()
    names = ", ".join(model.name for model in gateway.models)
    say(f"ready: {names}")
    for name, why in gateway.faults.items():
        log.error("model %r is not served: %s", name, why)
    while not signalled.done() and not serving.done():
        await asyncio.wait({signalled, serving}, timeout=LOOK_S)
        if gateway.dead and exit_on_death:
            raise RuntimeError("the engine has died: " + "; ".join(set(gateway.died.values())))
    signalled.cancel()


def leave(code: int) -> NoReturn:
    """End the process. What still loads is not waited for: libraries would abort at a thread's end."""
    if any(thread.name == LOADING for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


async def _end(gateway: Gateway, server: Server, serving: asyncio.Future[None], timeout_s: float) -> None:
    """Serve what is open for a while, cancel the rest, and stop listening."""
    gateway.drain()
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    while server.server_state.tasks and loop.time() < until and not server.force_exit:
        await asyncio.sleep(LOOK_S)
    await gateway.close(cancel=True)
    for _ in range(20):
        if not server.server_state.tasks:
            break
        await asyncio.sleep(LOOK_S)
    server.should_exit = True
    await serving
