"""What is to be asked of whom, and when: fixed before the first request is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from neustream.workload.asks import Ask

Api = Literal["completions", "chat", "images", "inference"]
PATHS: Mapping[Api, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "images": "/v1/images/generations",
    "inference": "/inference",
}
"""Routes. That of effective-batching answers in one piece, with the tokens that were asked for."""


@dataclass(frozen=True)
class Target:
    """How requests are put to a server that speaks OpenAI's routes.

    Attributes:
        url: with scheme, host and port, without a path: "http://127.0.0.1:8000".
        api: the route of texts; images always go to that of images.
        path: in place of the route's own, "" for that.
        model: the name in each body, "" for none; image_model: in those of images, "" for the same.
        stream: whether texts are streamed. Without, a request has one event: its end.
        ignore_eos: whether exactly `output_tokens` are asked for; fewer are then a failure.
        headers, body: added to each request; a key of an ask's `params` comes before one of `body`.
        told_headers: name of a header -> "ttft", "tpot", "e2e", "class" or "session": how a server
            is told the milliseconds that are promised, the class, or the conversation.
        id_prefix: what x-request-id begins with, before a request's id; "": no such header.
        timeout_s: after so long from when it is sent a request has failed.
        retries: how often a request that failed is sent again; its scheduled arrival stays.
        verify_tls: False takes any certificate.
    """

    url: str
    api: Api = "completions"
    path: str = ""
    model: str = ""
    stream: bool = True
    ignore_eos: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    told_headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 6 * 3600.0
    retries: int = 0
    verify_tls: bool = True
    image_model: str = ""
    id_prefix: str = ""

    def model_of(self, ask: Ask) -> str:
        """The name of the model that a request goes to."""
        return ask.model or (self.image_model if ask.image is not None else "") or self.model

    def path_of(self, ask: Ask) -> str:
        """The route that a request goes to."""
        if ask.image is not None:
            return self.path if self.path and self.api == "images" else PATHS["images"]
        return self.path or PATHS[self.api]


@dataclass(frozen=True)
class Plan:
    """One load, called a stage where a benchmark has several.

    Attributes:
        asks: in the order in which they are to come.
        name: of the load, as "rate 4".
        rate: requests a second that it was made for; None: none was asked for (closed loop, trace).
        concurrency: the most requests under way at once; None: no bound. With arrivals, a request
            that has to wait for its place is late by that; without, it has no schedule.
        duration_s: how long arrivals go on; None: till the last ask.
        arrivals: how they were drawn, as "gamma, cv 2"; `seed`: from what.
        meta: whatever its maker wants to find in the results again; must be JSON.
    """

    asks: Sequence[Ask]
    name: str = ""
    rate: float | None = None
    concurrency: int | None = None
    duration_s: float | None = None
    arrivals: str = ""
    seed: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scheduled(self) -> bool:
        """Whether requests have instants; else each comes as soon as there is a place."""
        return not self.asks or self.asks[0].arrival_s is not None

    def about(self) -> dict[str, Any]:
        """All but the asks, for the results' files."""
        return {**{k: v for k, v in vars(self).items() if k != "asks"}, "meta": dict(self.meta)}
