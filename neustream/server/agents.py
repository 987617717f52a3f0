"""Runs of agents: the outputs of their calls as they come, and the state at the end."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import CancelledError
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from neustream.core.events import LegEnded
from neustream.engine.clock import date
from neustream.errors import GraphError, NeustreamError
from neustream.server.bodies import AgentBody
from neustream.server.context import Context
from neustream.server.errors import HTTPError, of_request, of_validation
from neustream.server.models import AgentModel
from neustream.server.plain import plain_state
from neustream.server.promises import Promised, longest_ms
from neustream.server.streams import Outlet, stream_of
from neustream.server.wire import unless, while_there
from neustream.service.answer import Answer

LONG = 10**6
"""The size of work that is never done on the event loop."""


async def runs(request: Request) -> Response:
    """POST /v1/agents/{name}."""
    context = Context.of(request)
    body = await context.body(AgentBody)
    model = context.gateway.agent(request.path_params["name"])
    if body.model not in (None, model.name):
        raise HTTPError(400, f"model: the path names {model.name!r}", "invalid", "model")
    params = _params(body, model)
    promise = context.promise(body, model.slo)
    context.gateway.admit(model, promise.slo)
    run = Run(context, model, promise)
    context.about(run.about)
    try:
        run.submit(params)
        if body.stream:
            return await stream_of(context, run.events(), context.headers(promise), run.outlet)
        made = await while_there(request.receive, run.whole())
    except BaseException:
        run.end()
        raise
    run.end()
    headers = context.headers(promise)
    if promise.slo.promises:
        headers["x-neustream-outcome"] = "on_time" if run.kept["on_time"] else "late"
    return JSONResponse(made, headers=headers)


def _params(body: AgentBody, model: AgentModel) -> dict[str, Any]:
    """The parameters of a run; HTTPError for what the agent's own model of them does not allow."""
    if model.params is None:
        return body.params
    try:
        return model.params.model_validate(body.params).model_dump()
    except ValidationError as error:
        raise of_validation(error, "params") from None


class Run:
    """A run of an agent on its way.

    Attributes:
        outlet: by which it hears of a client that does not read.
    """

    def __init__(self, context: Context, model: AgentModel, promise: Promised) -> None:
        self.outlet = Outlet()
        self._context = context
        self._model = model
        self._promise = promise
        self._until = asyncio.get_running_loop().time() + promise.timeout_s
        self._tired: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answer: Answer[Any] | None = None

    def submit(self, params: dict[str, Any]) -> None:
        """Hand it to the engine; HTTPError for what cannot be served."""
        gateway, slo, id = self._context.gateway, self._promise.slo, self._context.id
        try:
            self._answer = gateway.submit(self._model, params, slo=slo, id=id)
        except (NeustreamError, TypeError, ValueError) as error:
            raise _told(error) from error
        self._patience = gateway.patience(self._model, slo, [id], self._tire)

    def _tire(self, why: HTTPError) -> None:
        if not self._tired.done():
            self._tired.set_exception(why)
            self._tired.exception()  # it is no fault if nobody waits any more

    async def whole(self) -> dict[str, Any]:
        """What the answer says, once it is over."""
        assert self._answer is not None
        until = None if math.isinf(self._until) else self._until
        try:
            async with asyncio.timeout_at(until):
                state = await unless(self._answer, self._tired)
        except TimeoutError:
            raise HTTPError(504, "its time ran out", "expired") from None
        except asyncio.CancelledError:
            if self._answer.cancelled():
                raise HTTPError(503, "cancelled", "cancelled") from None
            raise
        except Exception as error:
            raise _told(error) from error
        told, left_out = await self._context.gateway.think(plain_state, state, size=LONG)
        found: dict[str, Any] = {
            "id": f"run-{self._context.id}",
            "object": "agent.run",
            "created": int(date()),
            "model": self._model.name,
            "state": told,
        }
        if left_out:
            found["left_out"] = left_out
        if self._promise.report:
            found["neustream"] = self.kept
        return found

    async def events(self) -> AsyncIterator[bytes]:
        """An event for each output, and each node that it is through, then one with all that the answer says."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._read(queue)), asyncio.ensure_future(self._over(queue))]
        try:
            while True:
                found = await queue.get()
                if isinstance(found, BaseException):
                    raise found
                name, data = found
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
                if name == "done":
                    yield b"data: [DONE]\n\n"
                    return
        finally:
            self.end()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, queue: asyncio.Queue[Any]) -> None:
        """Put its outputs and nodes into the queue, then what the answer says; each with its name."""
        assert self._answer is not None
        most = self._context.config.limits.undelivered
        try:
            async for output in self._answer.happenings():
                self._patience.outputs += 1
                if self.outlet.blocked and queue.qsize() >= most:
                    self.outlet.full.set()
                    return
                if isinstance(output, LegEnded):
                    queue.put_nowait(("node", _node(output)))
                    continue
                size = LONG if isinstance(output["output"], Mapping) else 0  # there may be pictures in it
                queue.put_nowait(("output", await self._context.gateway.think(_event, output, size=size)))
            queue.put_nowait(("done", await self.whole()))
        except CancelledError as error:
            queue.put_nowait(_told(error))
        except Exception as error:  # noqa: BLE001  it is raised where events are made
            queue.put_nowait(_told(error))

    async def _over(self, queue: asyncio.Queue[Any]) -> None:
        """Put into the queue why it ends early, if its time or its patience is over."""
        until = None if math.isinf(self._until) else self._until
        try:
            async with asyncio.timeout_at(until):
                await asyncio.shield(self._tired)
        except TimeoutError:
            queue.put_nowait(HTTPError(504, "its time ran out", "expired"))
        except HTTPError as why:
            queue.put_nowait(why)

    @property
    def kept(self) -> dict[str, Any]:
        """How the promise was kept."""
        ended = None if self._answer is None else self._answer.ended
        seconds = 0.0 if ended is None else ended.latency_s
        slack = self._promise.slo.total - seconds
        return {
            "on_time": ended is not None and ended.on_time,
            "queue_ms": longest_ms([None if ended is None else ended.waited_s]),
            "e2e_ms": round(seconds * 1e3, 3),
            "slack_ms": None if math.isinf(slack) else round(slack * 1e3, 3),
        }

    def about(self) -> dict[str, Any]:
        """What the access log says of it."""
        found: dict[str, Any] = {"model": self._model.name}
        slo = self._promise.slo
        return {**found, "class": slo.name, **self.kept} if slo.promises else found

    def end(self) -> None:
        """Nobody waits any more; if it is not done it is given up."""
        if self._answer is not None:
            self._patience.end()
            self._answer.cancel()


def _event(output: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of an output: its call, its branch, and what of it JSON can tell."""
    told, _ = plain_state(output)
    if "output" not in told and isinstance(output["output"], Mapping):
        told["output"], _ = plain_state(output["output"])
    return told


def _node(leg: LegEnded) -> dict[str, Any]:
    """What is told of a call or a tool that a run is through."""
    first = None if leg.first_at is None else leg.first_at - leg.began
    slack = leg.due - leg.at
    return {
        "call": leg.leg,
        "branch": leg.branch,
        "status": leg.status,
        "on_time": not leg.late,
        "outputs": leg.outputs,
        "ttft_ms": None if first is None else round(first * 1e3, 3),
        "e2e_ms": round((leg.at - leg.began) * 1e3, 3),
        "slack_ms": None if math.isinf(slack) else round(slack * 1e3, 3),
    }


def _told(error: BaseException) -> HTTPError:
    """What a client is told; what a graph has against the parameters of a run is the client's mistake."""
    if isinstance(error, GraphError):
        return HTTPError(400, str(error), "invalid", "params")
    if isinstance(error, CancelledError | asyncio.CancelledError):
        return HTTPError(503, "cancelled", "cancelled")
    found = of_request(error)
    if found is not error:
        found.__cause__ = error
    return found
