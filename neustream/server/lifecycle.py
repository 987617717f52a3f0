"""One process: it listens while it loads, drains on a signal, and ends."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn

from neustream.engine.clock import WallClock
from neustream.errors import BackendError, NeustreamError
from neustream.server.app import build_app
from neustream.server.children import end_children
from neustream.server.config import HttpConfig, ServerConfig
from neustream.server.gateway import Gateway
from neustream.server.loading import LOADING, Loaded
from neustream.server.metrics import Metrics
from neustream.server.observe.access import AccessLog
from neustream.server.protocol import LARGEST_HEAD, NotOurs, Protocol, Rules, address_of, listening

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from neustream.server.observe.tracing import Tracer

log = logging.getLogger("neustream.server")

LOOK_S = 0.1
"""How often it is seen whether all that was open has ended, and whether the engine lives."""
M_ARENA_MAX = -8
ARENAS = 2
"""Of glibc's allocator."""


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
    gateway = Gateway(config.limits, metrics.tell, metrics.lives.open)
    access = AccessLog() if config.observe.access_log is not None else None
    app = build_app(gateway, config, metrics, keys, access)
    http = config.http
    sock = listening(http)
    drained = asyncio.Event() if stop is None else stop
    server = _server(app, config, metrics, drained.set)
    gateway.connections = lambda: len(server.server_state.connections)
    serving = asyncio.ensure_future(server.serve([sock]))
    pulse = asyncio.ensure_future(metrics.pulse())
    say(f"serving on {address_of(http, sock)}")
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
        await _end(gateway, server, serving, http)
        pulse.cancel()
        if http.uds is not None:
            http.uds.unlink(missing_ok=True)
        if tracer is not None:
            metrics.fold()
            await asyncio.get_running_loop().run_in_executor(None, tracer.close)
    return server.code


def _server(app: ASGIApp, config: ServerConfig, metrics: Metrics, drain: Callable[[], None]) -> Server:
    """What speaks HTTP; `drain` is called at a first signal."""
    http = config.http
    rules = Rules(
        http.head_timeout_s,
        http.write_timeout_s,
        2 * config.limits.max_open,
        lambda status, code: metrics.answered("", "none", status, code, 0),
    )
    logging.getLogger("uvicorn.error").addFilter(NotOurs())
    how = uvicorn.Config(
        app,
        http=partial(Protocol, rules),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=math.ceil(http.keep_alive_s),
        h11_max_incomplete_event_size=LARGEST_HEAD,
    )
    return Server(how, drain)


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
    backing = loaded.backing
    rules = () if backing is None else backing.policies
    if backing is not None:
        metrics.serves(backing.now())
    metrics.loaded(clock.now(), loaded.warmup_s, "+".join(kinds), "+".join(sorted(rules)))
    return loaded


def _signals_are_ours() -> None:
    """Python's handlers, again: what is loaded may have put its own below them (Ray dies of a SIGTERM)."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if handler is not None:
                signal.signal(number, handler)


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
    while not (loading.done() or signalled.done() or serving.done()):
        await asyncio.wait({loading, signalled, serving}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        _signals_are_ours()
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


def spare_memory() -> None:
    """Have glibc keep few arenas, unless the environment says how many; before there are threads.

    With an arena for each thread, pages that are free stay with the process. Other allocators have
    none.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_ARENA_MAX, ARENAS)


def keep_still() -> None:
    """Have collections of garbage leave out all that there is by now: models and libraries.

    A full one stops all threads while it looks at each object: a third of a second with torch.
    """
    gc.collect()
    gc.freeze()


def leave(code: int) -> NoReturn:
    """End the process. What still loads is not waited for: libraries would abort at a thread's end.

    The processes that it has started by then (Ray's) are ended.
    """
    if any(thread.name == LOADING for thread in threading.enumerate()):
        end_children()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


async def _end(gateway: Gateway, server: Server, serving: asyncio.Future[None], http: HttpConfig) -> None:
    """Serve what is open for a while, cancel the rest, and stop listening.

    Before that, new work is taken for `pre_drain_s`: load balancers hear of /ready a little later.
    """
    loop = asyncio.get_running_loop()
    gateway.drain(take=http.pre_drain_s > 0)
    until = loop.time() + http.pre_drain_s
    while loop.time() < until and not server.force_exit:
        await asyncio.sleep(LOOK_S)
    gateway.drain()
    until = loop.time() + http.shutdown_timeout_s
    while server.server_state.tasks and loop.time() < until and not server.force_exit:
        await asyncio.sleep(LOOK_S)
    await gateway.close(cancel=True)
    for _ in range(20):
        if not server.server_state.tasks:
            break
        await asyncio.sleep(LOOK_S)
    server.should_exit = True
    await serving
