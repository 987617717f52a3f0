"""What loading gives, on a thread that nobody has to wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Thread

from neustream.server.backing import Backing, OfService
from neustream.server.models import Model
from neustream.service.service import Service

LOADING = "neustream-load"
"""The thread that loads."""


@dataclass(frozen=True)
class Loaded:
    """What loading gives.

    Args:
        service: that runs, or a cluster; None: all models have engines of their own.
        models: that are served.
        failed: those that could not be loaded, and why.
        warmup_s: seconds of it that went into measuring them and starting the engine.
    """

    service: Service | Backing | None
    models: Sequence[Model]
    failed: Mapping[str, str] = field(default_factory=dict)
    warmup_s: float = 0.0

    @property
    def backing(self) -> Backing | None:
        """What serves most models."""
        return OfService(self.service) if isinstance(self.service, Service) else self.service


async def on_a_thread(load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives or raises; if nobody waits any more by then, what it gave is closed again."""
    loop = asyncio.get_running_loop()
    came: asyncio.Future[Loaded] = loop.create_future()

    def work() -> None:
        found: Loaded | BaseException
        try:
            found = load()
        except BaseException as error:  # noqa: BLE001  it is told to who waits
            found = error
        try:
            loop.call_soon_threadsafe(_answer, came, found)
        except RuntimeError:  # the loop is closed: the server has ended
            _answer(came, found)

    Thread(target=work, name=LOADING, daemon=True).start()
    return await came


def _answer(came: asyncio.Future[Loaded], found: Loaded | BaseException) -> None:
    """Hand over what was loaded; what nobody waits for any more is closed again."""
    if not came.done() and not came.get_loop().is_closed():
        if isinstance(found, BaseException):
            came.set_exception(found)
        else:
            came.set_result(found)
    elif isinstance(found, Loaded) and (backing := found.backing) is not None:
        Thread(target=partial(backing.close, cancel=True), daemon=True).start()
