"""Health, models, tokens, metrics; effective-batching's two routes."""

from __future__ import annotations

import asyncio
import math
from importlib.metadata import version as version_of
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from neustream.core.types import SLO
from neustream.server.bodies import ChatBody, DetokenizeBody, InferenceBody, TokenizeBody, unsupported
from neustream.server.config import PromiseConfig
from neustream.server.context import Context
from neustream.server.errors import HTTPError, of_request, retry_after
from neustream.server.models import ImageModel, Model, TextModel
from neustream.server.observe.board import cluster_of
from neustream.server.prompts import prompt_of_chat
from neustream.server.wire import unless, while_there


async def health(request: Request) -> Response:
    """GET /health: whether the process and its engine live; asks nobody."""
    gateway = request.app.state.gateway
    content = {"status": "ok" if gateway.alive else "failed", "state": gateway.state}
    return JSONResponse(content, 200 if gateway.alive else 503)


async def ready(request: Request) -> Response:
    """GET /ready: whether requests of all models are taken, by all that was asked for; else why not."""
    gateway = request.app.state.gateway
    faults = gateway.faults
    state = gateway.shown
    reasons = [f"model {name!r}: {why}" for name, why in faults.items()]
    content = {
        "state": state,
        "since_s": gateway.since_s,
        "reason": gateway.reason or "; ".join(reasons) or gateway.lacking,
    }
    if gateway.state == "ready":
        served = {model.name: "ready" for model in gateway.known if model.name not in faults}
        content["models"] = {**served, **faults}
    headers = {} if state == "ready" else {"retry-after": str(retry_after(gateway.again_s))}
    return JSONResponse(content, 200 if state == "ready" else 503, headers=headers)


async def cluster(request: Request) -> Response:
    """GET /cluster: the instances, and what happened between them; 404 if there is no cluster."""
    gateway = request.app.state.gateway
    gauges = gateway.gauges()
    found = cluster_of(gauges)
    if found is None:
        gateway.check()
        raise HTTPError(404, "there is no cluster behind this server", "not_found")
    return JSONResponse({"state": gauges.state, "reason": gauges.reason, "open": gauges.open, **found})


async def version(request: Request) -> Response:
    """GET /version."""
    return JSONResponse({"version": version_of("neustream")})


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    state = request.app.state
    text = state.metrics.render(state.gateway.gauges())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(request.app.state.openapi)


# -- models -------------------------------------------------------------------------------------------


async def models(request: Request) -> Response:
    """GET /v1/models."""
    state = request.app.state
    found = [_model(each, state.config.promises) for each in state.gateway.models]
    return JSONResponse({"object": "list", "data": found})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    name = request.path_params["id"]
    state = request.app.state
    for each in state.gateway.models:
        if each.name == name:
            return JSONResponse(_model(each, state.config.promises))
    raise HTTPError(404, f"no model {name[:100]!r}", "model_not_found", "model")


def _model(model: Model, promises: PromiseConfig) -> dict[str, Any]:
    about: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "neustream",
        "root": model.name,
        "neustream": {"kind": model.kind, "slo": _budgets(model.slo), "classes": list(promises.classes)},
    }
    if isinstance(model, TextModel):
        about["max_model_len"] = model.max_len
        if model.adapter:
            about["root"] = about["parent"] = model.base
    elif isinstance(model, ImageModel):
        about["neustream"]["sizes"] = list(model.sizes)
    elif model.params is not None:
        about["neustream"]["params"] = model.params.model_json_schema()
    return about


def _budgets(slo: SLO) -> dict[str, float]:
    """What is promised where nothing is said, in milliseconds; what is not promised is not there."""
    seconds = {"ttft_ms": slo.first, "tpot_ms": slo.step, "e2e_ms": slo.total}
    return {name: each * 1e3 for name, each in seconds.items() if math.isfinite(each)}


async def tokenize(request: Request) -> Response:
    """POST /tokenize."""
    context = Context.of(request)
    body = await context.body(TokenizeBody)
    model = context.gateway.text(body.model)
    if (name := unsupported(body)) is not None:
        raise HTTPError(400, f"{name} is not supported by this server", "unsupported", name)
    if body.messages is not None:
        chat = ChatBody(messages=body.messages, chat_template_kwargs=body.chat_template_kwargs)
        ids = (await prompt_of_chat(context, model, chat)).ids
    else:
        text = body.prompt or ""
        ids = await context.gateway.think(model.encode, text, body.special, size=len(text))
    content = {"count": len(ids), "max_model_len": model.max_len, "tokens": ids}
    return JSONResponse(content, headers=context.warned)


async def detokenize(request: Request) -> Response:
    """POST /detokenize."""
    context = Context.of(request)
    body = await context.body(DetokenizeBody)
    model = context.gateway.text(body.model)
    text = await context.gateway.think(model.decode, body.tokens, size=len(body.tokens))
    return JSONResponse({"prompt": text}, headers=context.warned)


# -- effective-batching -------------------------------------------------------------------------------


async def inference(request: Request) -> Response:
    """POST /inference: so many tokens behind a prompt; the answer has the prompt in it."""
    context = Context.of(request)
    body = await context.body(InferenceBody)
    model = context.gateway.text(None)
    context.gateway.admit(model, model.slo)
    ids = await context.gateway.think(model.encode, body.prompt, size=len(body.prompt))
    try:
        options: dict[str, Any] = {"max_tokens": body.num_tokens, "ignore_eos": True, "slo": model.slo}
        answer = context.gateway.submit(model, ids, id=context.id, **options)
    except Exception as error:
        raise of_request(error) from error
    tired: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    patience = context.gateway.patience(model, model.slo, [answer.id], tired.set_exception)
    try:
        done = await while_there(request.receive, unless(_result(answer), tired))
    except BaseException:
        answer.cancel()
        raise
    finally:
        patience.end()
    return JSONResponse({"completion": body.prompt + (done.text or "")}, headers=context.warned)


async def _result(answer: Any) -> Any:
    try:
        return await answer
    except Exception as error:
        raise of_request(error) from error


async def stats(request: Request) -> Response:
    """GET /stats: what became of all requests so far, in effective-batching's names."""
    report = request.app.state.gateway.service.report
    told = report.to_dict()
    tokens = (told.get("tokens") or {}).get("outputs")
    seconds = report.latency.mean * report.latency.count if report.latency.count else None
    if not tokens or not seconds:
        tokens = seconds = None
    content = {
        "latency-per-token": None if tokens is None else seconds / tokens,
        "throughput": None if tokens is None else tokens / seconds,
        "total-tokens-handled": tokens,
        "total-elapsed-time": seconds,
    }
    if request.query_params.get("format") == "full":
        content["neustream"] = told
    return JSONResponse(content)
