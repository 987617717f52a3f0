"""Fields of other servers' requests, for which nothing is done: which values of them ask for nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
IDLE: Mapping[str, tuple[Any, ...]] = {
    "prompt_logprobs": (*NOTHING, 0),
    "best_of": (*NOTHING, 1),
    "suffix": NOTHING,
    "length_penalty": (*NOTHING, 1),
    "tools": NOTHING,
    "tool_choice": (*NOTHING, "none", "auto"),
    "functions": NOTHING,
    "function_call": (*NOTHING, "none", "auto"),
    "response_format": (*NOTHING, {"type": "text"}),
    "use_beam_search": NOTHING,
    "chat_template": NOTHING,
    "guided_json": NOTHING,
    "guided_regex": NOTHING,
    "guided_choice": NOTHING,
    "guided_grammar": NOTHING,
    "include_stop_str_in_output": NOTHING,
    "allowed_token_ids": NOTHING,
    "bad_words": NOTHING,
    "truncate_prompt_tokens": (*NOTHING, -1),
    "documents": NOTHING,
    "continue_final_message": NOTHING,
    "add_generation_prompt": (None, True),
    "structured_outputs": NOTHING,
    "prompt_embeds": NOTHING,
    "audio": NOTHING,
    "modalities": (*NOTHING, ["text"]),
}
"""Fields that real clients send and that nothing is done for: the values that mean just that."""


def asking(fields: Mapping[str, Any]) -> str | None:
    """The first of them that asks for what cannot be done; None if there is none."""
    for name, value in fields.items():
        idle = IDLE.get(name)
        if idle is not None and not among(value, idle):
            return name
    return None


def among(value: Any, idle: Iterable[Any]) -> bool:
    """Whether a value is one of those, of their type too: 0 is not False."""
    return any(_same(value, each) for each in idle)


def _same(value: Any, idle: Any) -> bool:
    if isinstance(value, bool) or isinstance(idle, bool):
        return value is idle
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return bool(value == idle)
