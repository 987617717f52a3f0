"""The front of `neustream serve`, on a thread of the process that measures it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import Queue

from neustream.server.config import ModelConfig, ServerConfig
from neustream.server.lifecycle import run
from neustream.server.loading import Loaded
from neustream.server.metrics import Metrics

READY_S = 600


class Here:
    """A front that serves one model, once `load` has made it.

    Attributes:
        port: where it listens, on this machine.
    """

    def __init__(self, load: Callable[[Metrics], Loaded]) -> None:
        self._load = load
        self._told: Queue[str] = Queue()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        self.port = int(self._told.get(timeout=60).rpartition(":")[2])
        self._told.get(timeout=READY_S)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        models = [ModelConfig(name="tiny", kind="text", backend={})]
        config = ServerConfig.model_validate({"models": models, "http": {"port": 0}})
        await run(config, self._load, (), self._told.put, self._stop)

    def close(self) -> None:
        """Stop, once what is open is served."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
