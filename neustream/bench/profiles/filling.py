"""The tokens in templates: `REPLACE_ENV_NAME` stands for what is known by that name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from neustream.errors import ConfigError

TOKEN = re.compile(r"REPLACE_ENV_(?P<name>[A-Za-z0-9_]+)")
MODEL = "LLMDBENCH_DEPLOY_CURRENT_MODEL"
TOKENIZER = "LLMDBENCH_DEPLOY_CURRENT_TOKENIZER"
URL = "LLMDBENCH_HARNESS_STACK_ENDPOINT_URL"
OPTIONAL = (MODEL, TOKENIZER, URL, "MAX_MODEL_LEN")
"""Ends of names that a profile can be read without."""
Place = tuple[str, ...]


def known(model: str | None, tokenizer: str | None, url: str | None) -> dict[str, str]:
    """What tokens stand for: options come before environment variables.

    A tokenizer that nobody names is the model's, as llm-d-benchmark has it.
    """
    found = {name: value for name, value in os.environ.items() if value}
    given = {MODEL: model, TOKENIZER: tokenizer, URL: url}
    found |= {name: value for name, value in given.items() if value}
    if MODEL in found:
        found.setdefault(TOKENIZER, found[MODEL])
    return found


def filled(values: Any, names: Mapping[str, str]) -> Any:
    """A copy with every known token replaced; unknown ones stay."""
    if isinstance(values, dict):
        return {key: filled(value, names) for key, value in values.items()}
    if isinstance(values, list):
        return [filled(value, names) for value in values]
    if not isinstance(values, str):
        return values
    return TOKEN.sub(lambda match: names.get(match["name"], match[0]), values)


def without_open(values: Any) -> Any:
    """A copy without a model, tokenizer, URL or bound on the context that is still a token.

    The server tells its model, and a URL is only needed once there is a run.
    """
    if isinstance(values, dict):
        kept = {key: without_open(value) for key, value in values.items()}
        return {key: value for key, value in kept.items() if not _open(value)}
    return [without_open(value) for value in values] if isinstance(values, list) else values


def _open(value: Any) -> bool:
    match = TOKEN.match(value) if isinstance(value, str) else None
    if match is None or not match["name"].endswith(OPTIONAL):
        return False
    behind = value[match.end() :]
    return not behind or (match["name"] == URL and behind.startswith("/"))


def check_filled(values: Any, unused: set[str]) -> None:
    """ConfigError for a token that stands for nothing, but in a key that is not used."""
    for place, name in _tokens(values, ()):
        keys = {".".join(place[:end]) for end in range(1, len(place) + 1)}
        if not keys & unused:
            raise ConfigError(
                f"{'.'.join(place)}: REPLACE_ENV_{name} stands for nothing: "
                f"set the environment variable {name}, or give -o {'.'.join(place)}=VALUE"
            )


def _tokens(values: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(values, str):
        yield from ((place, match["name"]) for match in TOKEN.finditer(values))
    if isinstance(values, list):
        values = dict(enumerate(values))
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _tokens(value, (*place, str(key)))
