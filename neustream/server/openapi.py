"""The document that says what the routes take and answer, made of the models that check it."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel

from neustream.server.bodies import (
    AgentBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EditBody,
    ImageBody,
    InferenceBody,
    TokenizeBody,
)

BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/completions": (CompletionBody, "A text that goes on from a prompt"),
    "/v1/chat/completions": (ChatBody, "The next message of a chat"),
    "/v1/images/generations": (ImageBody, "Images of a prompt"),
    "/v1/images/edits": (EditBody, "Images of a picture"),
    "/v1/agents/{name}": (AgentBody, "A run of an agent"),
    "/tokenize": (TokenizeBody, "The tokens of a text"),
    "/detokenize": (DetokenizeBody, "The text of tokens"),
    "/inference": (InferenceBody, "Of effective-batching: so many tokens behind a prompt"),
}
FORM = {
    "prompt": {"type": "string"},
    "model": {"type": "string"},
    "size": {"type": "string"},
    "output_format": {"type": "string", "enum": ["png", "jpeg", "webp"]},
    "n": {"type": "integer", "minimum": 1, "maximum": 10},
    "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 200},
    "seed": {"type": "integer"},
    "strength": {"type": "number"},
    "stream": {"type": "boolean"},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
}
"""Fields of an edit's form beside its files; those of its JSON that are not text are JSON here too."""
GETS = {
    "/v1/models": "The models that are served",
    "/v1/models/{id}": "One of them",
    "/health": "Whether the process and its engine live",
    "/ready": "Whether requests are taken",
    "/cluster": "The instances of a cluster, and what happened between them",
    "/metrics": "What Prometheus reads",
    "/version": "The version of this server",
    "/openapi.json": "This document",
    "/stats": "Of effective-batching: latency a token, throughput",
}
FAULTS = {
    "400": "What was sent cannot be served: the field and what is allowed are named",
    "401": "No key, or a wrong one",
    "403": "A host that is not allowed",
    "404": "No such route or model",
    "405": "Another method is meant",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "415": "The body is no JSON",
    "429": "Too many requests, or others took the time of this one: see Retry-After",
    "431": "There are too many headers, or they are too large",
    "500": "A stage failed",
    "503": "Loading, draining, or the engine has failed: see Retry-After",
    "504": "The time of the request ran out",
}


def document() -> dict[str, Any]:
    """The whole of it, as OpenAPI 3.1."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, (body, about) in BODIES.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        paths[path] = {
            "post": {
                "summary": about,
                "requestBody": {"required": True, "content": _contents(body, reference)},
                "responses": _responses("application/json"),
                **_of_path(path),
            }
        }
    for path, about in GETS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        paths[path] = {"get": {"summary": about, "responses": _responses(kind), **_of_path(path)}}
    info = {"title": "neustream", "version": version("neustream")}
    return {
        "openapi": "3.1.0",
        "info": info,
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _of_path(path: str) -> dict[str, Any]:
    """The parameters that a path names."""
    names = re.findall(r"{(\w+)}", path)
    schema = {"type": "string"}
    found = [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]
    return {"parameters": found} if found else {}


def _contents(body: type[BaseModel], reference: dict[str, str]) -> dict[str, Any]:
    """The forms of a body: JSON; of an edit a form too, in which pictures are files."""
    found: dict[str, Any] = {"application/json": {"schema": reference}}
    if body is EditBody:
        file = {"type": "string", "format": "binary"}
        fields = {**FORM, "image": file, "mask": file}
        schema = {"type": "object", "properties": fields, "required": ["image", "prompt"]}
        found["multipart/form-data"] = {"schema": schema}
    return found


def _responses(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "200": {
            "description": "Done",
            "content": {kind: {}, "text/event-stream": {}},
        }
    }
    for status, about in FAULTS.items():
        found[status] = {"description": about, "content": {"application/json": {}}}
    return found
