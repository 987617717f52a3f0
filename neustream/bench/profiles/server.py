"""What a server counts as a token, and how long it takes to be ready."""

from __future__ import annotations

import http.client
import json
import urllib.request
from dataclasses import dataclass, replace
from typing import Any

from neustream.bench.looking import PATIENCE_S, models_of, named
from neustream.bench.plan import PATHS, Target
from neustream.engine.clock import epoch, stopwatch
from neustream.workload.texts import Texts

PROBES = (4, 12)
"""Words of the prompts that tell what a token is."""


@dataclass(frozen=True)
class Readiness:
    """A server that is ready: asked when (seconds since 1970), after how long, its models."""

    asked: float
    seconds: float
    models: tuple[str, ...]


def readiness(target: Target, wait_s: float) -> Readiness:
    """Wait until a server tells its models; BackendError if it does not within `wait_s` seconds."""
    began, asked = epoch(), stopwatch()
    models = models_of(target, wait_s)
    return Readiness(began, stopwatch() - asked, tuple(models))


def words_a_token(target: Target) -> float | None:
    """How many words of made texts are a token for a server; None if it does not tell its counts.

    Two prompts are asked, so that what stands around each does not count.
    """
    try:
        few, many = (_prompt_tokens(target, words) for words in PROBES)
        return (PROBES[1] - PROBES[0]) / (many - few) if many > few else None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return None


def _prompt_tokens(target: Target, words: int) -> int:
    text = Texts().text(words, 0)
    asked: dict[str, Any] = {"prompt": text}
    if target.api == "chat":
        asked = {"messages": [{"role": "user", "content": text}]}
    body = {**asked, "model": target.model, "max_tokens": 1, **target.body, "stream": False}
    url = target.url + (target.path or PATHS[target.api])
    headers = {"content-type": "application/json", **target.headers}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return int(json.load(answer)["usage"]["prompt_tokens"])


def with_model(target: Target, models: list[str] | tuple[str, ...]) -> Target:
    """A target that names a model: the first that the server tells of, if it names none."""
    return target if target.model else replace(target, model=named(target, list(models)))
