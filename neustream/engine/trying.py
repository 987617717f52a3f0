"""One call of a tool: within its time, and made anew if it fails."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from neustream.core.batch import StepInput
from neustream.core.graph import Tool
from neustream.core.reasons import span
from neustream.errors import StageFailed, told

Came = tuple[Any, BaseException | None]
"""What a call returned, or raised."""


async def tried(tool: Tool, given: StepInput, stopped: Callable[[], bool]) -> Any:
    """What a tool returns. `stopped`: whether nobody wants that any more.

    Raises:
        StageFailed: it failed as often as it may: with what it raised last, or the time it took.
    """
    error: BaseException | None = None
    for _ in range(tool.retries + 1):
        try:
            return await _once(tool, given)
        except BaseException as raised:
            if tool.retries == 0 or stopped():
                raise
            error = raised
    raise StageFailed(f"{told(error) if error else ''} ({tool.retries + 1} tries)") from error


async def _once(tool: Tool, given: StepInput) -> Any:
    """One try. A call that is not back in time is cancelled, and not waited for."""
    function = tool.call
    assert function is not None
    work = _guarded(function, given) if is_async(function) else _on_a_thread(function, given)
    if tool.timeout_s == math.inf:
        value, error = await work
    else:
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait([task], timeout=tool.timeout_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()
            raise StageFailed(f"it did not return within {span(tool.timeout_s)}")
        value, error = task.result()
    if error is not None:
        raise error
    if tool.retries and not isinstance(value, Mapping):
        raise StageFailed(f"it must return a dict, got {type(value).__name__}")
    return value


async def _guarded(function: Callable[[StepInput], Any], given: StepInput) -> Came:
    """What came of an `async def`; a task that raised SystemExit would end the event loop."""
    try:
        return await function(given), None
    except BaseException as error:  # noqa: BLE001  a tool may raise anything
        return None, error


def called(function: Callable[[StepInput], Any], given: StepInput) -> Any:
    """What a plain function returns; StageFailed if that is a coroutine."""
    result = function(given)
    if inspect.iscoroutine(result):
        result.close()
        raise StageFailed("it returned a coroutine: make it an `async def`")
    return result


def is_async(function: object) -> bool:
    """Whether calling it only makes a coroutine."""
    call = getattr(function, "__call__", None)  # noqa: B004  of an object, its method
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _on_a_thread(function: Callable[[StepInput], Any], given: StepInput) -> asyncio.Future[Came]:
    """What came of a plain function on a thread of its own, which ends when the function does."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Came] = loop.create_future()

    def settle(came: Came) -> None:
        if not answer.done():
            answer.set_result(came)

    def work() -> None:
        try:
            came: Came = called(function, given), None
        except BaseException as error:  # noqa: BLE001  a tool may raise anything
            came = None, error
        with contextlib.suppress(RuntimeError):  # nobody is there any more to hear of it
            loop.call_soon_threadsafe(settle, came)

    threading.Thread(target=work, daemon=True, name="neustream-tool-tried").start()
    return answer
