"""Tools and other calls that just start: functions on threads, coroutines on one event loop."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from neustream.core.batch import Batch, StepInput
from neustream.core.events import Update
from neustream.core.graph import Tool
from neustream.engine.clock import Clock
from neustream.engine.events import Done
from neustream.engine.executor import settled
from neustream.engine.trying import called, is_async, tried
from neustream.engine.worker import Pieces, attend, failed
from neustream.errors import BackendError, NeustreamError, RequestError, StageFailed

Function = Callable[[StepInput], Update | Awaitable[Update]]
"""One call for one request: what it returns is merged into the request's state."""


class ToolExecutor:
    """Runs the calls of a pool with a `concurrency`.

    A plain function runs on a thread of its own while it takes; an `async def` is awaited, with all
    others, on one thread. What a call raises fails its own request.

    Args:
        tools: the calls by stage name: `async def search(input): ...`, a plain function, or the
            `tool` of a stage, whose `timeout_s` and `retries` hold then. A plain function that is
            still not back at its timeout is left to its thread, and nobody waits for it. An
            `async def` is cancelled then, and when its request is; other calls of those go on. A
            plain function is not tried again for a request that is over.

    Raises:
        RequestError: a tool is no function.
        BackendError: it is closed, or another process made it.

    Attributes:
        alone_s: 0: calls have no Python to themselves.
    """

    alone_s = 0.0

    def __init__(self, tools: Mapping[str, Function | Tool]) -> None:
        self._tools: dict[str, Tool] = {}
        for stage, tool in tools.items():
            known = tool if isinstance(tool, Tool) else Tool(tool)
            if not callable(known.call):
                what = "none" if known.call is None else type(known.call).__name__
                raise RequestError(f"stage {stage!r}: a tool is a function, got {what}")
            self._tools[stage] = known
        self._process = os.getpid()
        self._closing = threading.Lock()
        self._closed = False
        self._threads: dict[int, _Thread] = {}
        self._awaits: _Awaits | None = None

    def start(self, batch: Batch, clock: Clock) -> None:
        if os.getpid() != self._process:
            raise BackendError(f"this executor's threads are those of process {self._process}")
        tool = self._tools.get(batch.stage)
        if tool is None or len(batch) != 1:
            why = f"no tool for it; tools: {sorted(self._tools)}"
            if tool is not None:
                why = f"a tool is called for one request at a time, got {len(batch)}"
            clock.post(Done(batch, failed(batch.stage, StageFailed(why))), clock.now())
            return
        call = _Call(batch, clock, cancellable=is_async(tool.call))
        with self._closing:
            if self._closed:
                raise BackendError("this executor is closed")
            if tool.timeout_s < math.inf or tool.retries or is_async(tool.call):
                self._await(call, tool)
                return
            thread = self._threads.get(batch.worker)
            if thread is None:
                thread = self._threads[batch.worker] = _Thread(f"neustream-tool-{batch.worker}")
        assert tool.call is not None
        thread.inbox.put(partial(call.run, tool.call))

    def stop(self, id: str) -> None:
        """Cancel the `async def` that runs for a request; a plain function is not tried again."""
        with self._closing:
            if self._awaits is not None:
                self._awaits.cancel(id)

    def release(self, id: str) -> None:
        """Calls keep nothing."""

    def export(self, input: StepInput, worker: int = 0) -> Future[Pieces]:
        """Nothing: calls keep nothing."""
        return settled({})

    def adopt(self, input: StepInput, pieces: Pieces, worker: int = 0) -> Future[None]:
        """Nothing to do."""
        return settled(None)

    def close(self, *, wait: bool = True) -> None:
        with self._closing:
            self._closed = True
            threads = list(self._threads.values())
            for thread in threads:
                thread.inbox.put(None)
            if self._awaits is not None:
                self._awaits.close()
        for each in threads if wait else ():
            each.thread.join()
        if wait and self._awaits is not None:
            self._awaits.thread.join()

    def here(self) -> bool:
        present = threading.current_thread()
        awaits = self._awaits
        if awaits is not None and awaits.thread is present:
            return True
        return any(thread.thread is present for thread in list(self._threads.values()))

    def _await(self, call: _Call, tool: Tool) -> None:
        if self._awaits is None:
            self._awaits = _Awaits()
        self._awaits.add(call, tool)


class _Call:
    """A step that is under way: one call, for one request. `task`: that awaits it.

    `cancellable`: whether it can be ended midway.
    """

    def __init__(self, batch: Batch, clock: Clock, *, cancellable: bool) -> None:
        [self._input] = batch.inputs()
        self.id = self._input.id
        self.task: asyncio.Task[None] | None = None
        self._batch = batch
        self._clock = clock
        self._cancellable = cancellable
        self._began = self._stopped = False

    def run(self, function: Function) -> None:
        """Call a plain function."""
        try:
            result: Any = called(function, self._input)
        except BaseException as error:  # noqa: BLE001  a tool may raise anything
            result = failed(self._batch.stage, error)
        self._over(result)

    async def tried(self, tool: Tool) -> None:
        """Call a tool, within its time, and again if it fails."""
        self._began = True
        result: Any = {}
        try:
            if not self._stopped:
                result = await tried(tool, self._input, lambda: self._stopped)
        except BaseException as error:  # noqa: BLE001  also what would end the event loop
            result = {} if self._stopped else failed(self._batch.stage, error)
        self._over(result)

    def stop(self) -> None:
        """On the event loop: nobody wants it any more."""
        self._stopped = True
        # a task that never begins would not tell that it is over
        if self.task is not None and self._began and self._cancellable:
            self.task.cancel()

    def _over(self, result: Update | NeustreamError) -> None:
        self._clock.post(Done(self._batch, [result]), self._clock.now())


class _Thread:
    """A thread that does one thing after the other, until None comes."""

    def __init__(self, name: str) -> None:
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=attend, args=(self.inbox,), daemon=True, name=name)
        self.thread.start()


class _Awaits:
    """An event loop on a thread; it ends when it is closed and nothing is awaited any more."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._calls: dict[asyncio.Task[None], _Call] = {}
        self._by_id: dict[str, _Call] = {}
        name = "neustream-tools"
        self.thread = threading.Thread(target=self._serve, daemon=True, name=name)
        self.thread.start()

    def add(self, call: _Call, tool: Tool) -> None:
        self._loop.call_soon_threadsafe(self._begin, call, tool)

    def cancel(self, id: str) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop, id)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._over.set)

    def _begin(self, call: _Call, tool: Tool) -> None:
        task = call.task = self._loop.create_task(call.tried(tool))
        self._calls[task] = self._by_id[call.id] = call
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        call = self._calls.pop(task)
        if self._by_id.get(call.id) is call:
            del self._by_id[call.id]

    def _stop(self, id: str) -> None:
        call = self._by_id.get(id)
        if call is not None:
            call.stop()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_over())

    async def _until_over(self) -> None:
        await self._over.wait()
        while self._calls:
            await asyncio.wait(list(self._calls))
