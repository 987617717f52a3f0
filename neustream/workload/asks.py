"""Requests as all that serve them understand: a simulator, a service in this process, an HTTP server.

Times are seconds, lengths tokens, sizes pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Prompt = str | tuple[int, ...]
"""A text, or the ids of its tokens."""
CAPTION = 12
"""Tokens of the prompt of an image, where nobody says how many."""


@dataclass(frozen=True)
class Limits:
    """What a request was promised: to the first token, mean of each further one, all of it.

    inf promises nothing. `weight`: what keeping the promise is worth.
    """

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    e2e_s: float = math.inf
    weight: float = 1.0

    @property
    def promises(self) -> bool:
        """Whether anything is promised."""
        return min(self.ttft_s, self.tpot_s, self.e2e_s) < math.inf

    def to_dict(self) -> dict[str, float]:
        """Without what is not promised: infinity is no JSON."""
        return {name: value for name, value in vars(self).items() if math.isfinite(value)}


NO_LIMITS = Limits()


@dataclass(frozen=True)
class ImageAsk:
    """What an image is to be like; None: as the server likes. `frames`: of a video."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    frames: int | None = None
    number: int = 1


@dataclass(frozen=True)
class Ask:
    """One request of a workload.

    Attributes:
        id: none has the same.
        arrival_s: when it comes, from the start of its load; None: as soon as there is a place.
        prompt: a text or ids of tokens; "" if only lengths are known (a simulator needs no more).
        input_tokens: how long the prompt is; None: not known.
        output_tokens: the most that are generated; None for an image.
        ends_after: outputs after which a simulated model ends; None: at `output_tokens`.
        image: what is asked of an image; None: it is a text that is asked for.
        limits: what is promised; `slo_class`: the class that this came from, "" for none.
        session: the conversation that it is a turn of, "" for none.
        follows: the id of the turn before, of the same session and earlier in the plan: its prompt
            and what was answered stand before `prompt`, and it is not sent before that one has ended
            and `think_s` have passed; "" for none.
        model: which; "": the one that the target names.
        prefix: ids of the blocks that the prompt begins with (`Row.hash_ids`), if they are known.
        params: what else is asked, as the body of a request has it.
    """

    id: str
    arrival_s: float | None = None
    prompt: Prompt = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    ends_after: int | None = None
    image: ImageAsk | None = None
    limits: Limits = NO_LIMITS
    slo_class: str = ""
    session: str = ""
    follows: str = ""
    think_s: float = 0.0
    model: str = ""
    prefix: tuple[int, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
