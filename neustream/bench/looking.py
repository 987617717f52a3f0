"""Whether a server is there, and what it serves: asked before the load begins."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from threading import Event
from typing import Any

from neustream.bench.plan import Target
from neustream.engine.clock import stopwatch
from neustream.errors import BackendError, told

PAUSE_S = 0.25
"""Between two looks."""
PATIENCE_S = 10.0
"""The longest that a look may take."""


def models_of(target: Target, wait_s: float = 0.0, *, images: bool = False) -> list[str]:
    """The names of the models that it serves: those that make texts, or `images`, first.

    It is asked again for `wait_s` seconds if nobody answers.

    Raises:
        BackendError: nobody answers, or not with a list of models.
    """
    until = stopwatch() + wait_s
    while True:
        try:
            return _models(target, images)
        except BackendError:
            if stopwatch() >= until:
                raise
            Event().wait(PAUSE_S)


def _models(target: Target, images: bool) -> list[str]:
    url = f"{target.url.rstrip('/')}/v1/models"
    try:
        request = urllib.request.Request(url, headers=dict(target.headers))
        with urllib.request.urlopen(
            request, timeout=PATIENCE_S, context=_context(target)
        ) as answer:
            data = json.load(answer)["data"]
        return [str(each["id"]) for each in sorted(data, key=lambda each: not _fits(each, images))]
    except urllib.error.HTTPError as error:
        raise BackendError(f"{url}: status {error.code}, {error.reason}") from None
    except urllib.error.URLError as error:
        why = error.reason if isinstance(error.reason, str) else told(error.reason)
        raise BackendError(f"{url}: {why}") from None
    except (OSError, http.client.HTTPException) as error:
        raise BackendError(f"{url}: {told(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackendError(f"{url}: no list of models: {told(error)}") from None


def _fits(model: dict[str, Any], images: bool) -> bool:
    """Whether a model makes what is asked for, as far as its server tells (ours does)."""
    told = model.get("neustream") or {}
    wanted = "image" if images else "text"
    return str(told.get("kind", wanted)) == wanted


def _context(target: Target) -> ssl.SSLContext | None:
    if target.verify_tls or not target.url.startswith("https"):
        return None
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def named(target: Target, models: list[str]) -> str:
    """The model to ask for where none is named: the first."""
    if not models:
        raise BackendError(f"{target.url} serves no model; name one with --model")
    return models[0]
