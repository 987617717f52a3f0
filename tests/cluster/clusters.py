"""Heads with hand-made instances: what is told to them is what a test says."""

from __future__ import annotations

from typing import Any

from neustream import SLO, Graph, Request, Stage, TableProfile, loop, seq
from neustream.cluster import messages as say
from neustream.cluster.book import Settings
from neustream.cluster.head import Head
from neustream.cluster.rules.slack import Slack
from neustream.core.outlook import LineOutlook, Outlook

STEP = Stage("step", max_batch=4)
GRAPH = Graph("image", seq(loop(STEP, times=lambda job: job.params["steps"]), Stage("decode")))
STREAM = Graph("stream", loop(Stage("frame", emits=True), times=lambda job: job.params["steps"]))
PROFILES = {
    "step": TableProfile("step", [1, 2, 4], [0.1, 0.12, 0.2]),
    "decode": TableProfile("decode", [1], [0.1]),
    "frame": TableProfile("frame", [1], [0.1]),
}
STAGES = tuple(PROFILES)


def head_of(*names: str, now: float = 0.0, settings: Settings | None = None, **options: Any) -> Head:
    """A head with instances of these names that have told nothing but that they are there."""
    slow = {
        name: TableProfile(name, profile.batch, [3 * x for x in profile.latency_s])
        for name, profile in PROFILES.items()
    }
    router = options.pop("router", Slack())
    head = Head([GRAPH, STREAM], {"": PROFILES, "slow": slow}, router, settings=settings, **options)
    for name in names:
        head.joined(name, now, stages=STAGES)
    head.pop_orders()
    return head


def request(id: str, arrival: float = 0.0, slo: SLO | None = None, steps: int = 3, graph: Graph = GRAPH) -> Request:
    return Request(id, graph, arrival, slo or SLO(), {"steps": steps})


def orders_of(head: Head, kind: type) -> list[Any]:
    """The orders of one kind; the others are gone."""
    return [order for order in head.pop_orders() if isinstance(order, kind)]


def send(head: Head, one: Request, now: float = 0.0) -> say.Send:
    """Submit a request, and let its instance take it."""
    head.submit(one, now)
    (order,) = orders_of(head, say.Send)
    head.heard(order.instance, say.Took(one.id, order.term), now)
    return order


def over(id: str, term: int, status: str = "done", outputs: int = 0, reason: str = "") -> say.Over:
    return say.Over(id, term, status, reason, {"image": id} if status == "done" else None, outputs, 0.0, True)


def busy(instance: str, jobs: int, due_in: float, left: float = 10.0, sent_at: float = 0.0) -> Outlook:
    """The outlook of an instance with so many jobs, all with as many steps left."""
    line = LineOutlook("step", (left,) * jobs, (due_in,) * jobs, (0.1,) * jobs, (1.0,) * jobs)
    return Outlook(instance, sent_at, 1000, 0.1, 0.05 * jobs * left, jobs, 0, (line,))
