"""What became of one request, as its client saw it. Instants are seconds from the load's start."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from neustream.workload.asks import NO_LIMITS, Limits

Outcome = Literal[
    "done",
    "connect",
    "timeout",
    "status",
    "not_a_stream",
    "error_event",
    "invalid_json",
    "cut",
    "no_token",
    "short",
    "blocked",
    "interrupted",
    "dropped",
    "failed",
]
FAILURES: Mapping[Outcome, str] = {
    "connect": "nobody took the connection, or it broke before a status came",
    "timeout": "not over in time",
    "status": "a status of 400 or more, or one that is no success",
    "not_a_stream": "an answer that is no stream of events, or is compressed",
    "error_event": "the stream told of an error",
    "invalid_json": "an event that is no JSON object",
    "cut": "the connection ended before [DONE] and before any finish_reason",
    "no_token": "an answer without a token or an image",
    "short": "fewer tokens than were asked for, with ignore_eos",
    "blocked": "the turn before it failed, so that it was never sent",
    "interrupted": "the benchmark was interrupted when it was under way",
    "dropped": "the policy gave it up (served in this process, or simulated)",
    "failed": "a stage failed it (served in this process, or simulated)",
}
"""All that may become of a request but "done", and what it means."""
Counted = Literal["usage", "tokenizer", "chunks", "asked", ""]
"""How output tokens were counted ("asked": as many as were asked for); "": there were none."""


@dataclass
class Record:
    """One request. Everything that was offered has one, whatever became of it.

    Attributes:
        id, session, model, slo_class, limits: as of its `Ask`.
        kind: what was asked for.
        outcome: "done", or a key of `FAILURES`; `error`: in words; `status`: of HTTP, 0 for none.
        code: of the error, as the server gave it.
        scheduled_s: when it was to be sent. In a closed loop, when there was a place for it; of a
            further turn, not before the one before it was over (and thought about).
        waited_s: how long after that it waited for a place, of a bounded number.
        sent_s: when its client began with it; None: never.
        token_times_s: when each token came: one for each event with a token.
        end_s: when it was over; None: never sent.
        asked_tokens: the most that were to be generated.
        input_tokens, output_tokens: by `counted_by`; None: nobody knows.
        image: width, height, steps, frames and number, as asked; empty for a text.
        images: that came back.
        sent_bytes, received_bytes: of bodies.
        retries: how often it was sent again.
        server: what the server says of it (`usage.neustream`).
        text: what was generated, if that is kept.
        params: what else was asked.
    """

    id: str
    kind: Literal["text", "image"] = "text"
    outcome: Outcome = "done"
    status: int = 0
    code: str = ""
    error: str = ""
    scheduled_s: float = 0.0
    waited_s: float = 0.0
    sent_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    asked_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    counted_by: Counted = ""
    finish_reason: str = ""
    image: dict[str, int] = field(default_factory=dict)
    images: int = 0
    limits: Limits = NO_LIMITS
    slo_class: str = ""
    session: str = ""
    model: str = ""
    sent_bytes: int = 0
    received_bytes: int = 0
    retries: int = 0
    server: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    params: dict[str, Any] = field(default_factory=dict)

    # -- what is told of it ---------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.outcome == "done"

    @property
    def lag_s(self) -> float:
        """How late its client sent it, for no other reason than itself; 0 if it was sent again."""
        if self.sent_s is None or self.retries:
            return 0.0
        return max(0.0, self.sent_s - self.scheduled_s - self.waited_s)

    @property
    def first_s(self) -> float | None:
        """When the first token came."""
        return self.token_times_s[0] if self.token_times_s else None

    def ttft_s(self, since: Since = "scheduled") -> float | None:
        """From its (scheduled) arrival to the first token."""
        return None if self.first_s is None else self.first_s - self._start(since)

    def e2e_s(self, since: Since = "scheduled") -> float | None:
        """From its (scheduled) arrival to its end."""
        return None if self.end_s is None else self.end_s - self._start(since)

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of each token after the first; None with fewer than two."""
        count = self.output_tokens or len(self.token_times_s)
        if count < 2 or not self.token_times_s:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (count - 1)

    def ntpot_s(self, since: Since = "scheduled") -> float | None:
        """Seconds from its arrival to its end, by output token."""
        e2e = self.e2e_s(since)
        return e2e / self.output_tokens if e2e is not None and self.output_tokens else None

    @property
    def itls_s(self) -> list[float]:
        """Seconds between tokens that follow each other."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times_s)]

    def scale(self, since: Since = "scheduled") -> float:
        """The factor on all its limits at which they would just have been met; inf: at none.

        A request that was promised nothing needs 0, if it is done.
        """
        if not self.done:
            return math.inf
        pairs = (
            (self.ttft_s(since), self.limits.ttft_s),
            (self.tpot_s, self.limits.tpot_s),
            (self.e2e_s(since), self.limits.e2e_s),
        )
        return max(0.0 if took is None else took / limit for took, limit in pairs)

    def met(self, since: Since = "scheduled", scale: float = 1.0) -> bool:
        """Whether it is done, and within all that was promised."""
        return self.scale(since) <= scale

    # -- files ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "limits": self.limits.to_dict()}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Record:
        """Raises TypeError for what is no record."""
        return cls(**{**told, "limits": Limits(**told["limits"])})

    def _start(self, since: Since) -> float:
        return self.scheduled_s if since == "scheduled" or self.sent_s is None else self.sent_s


Since = Literal["scheduled", "sent"]
"""What latencies count from."""
