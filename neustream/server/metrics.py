"""What /metrics tells: the engine's records and the front's notes, counted."""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest

from neustream.core.batch import StepInfo
from neustream.engine.clock import Clock, WallClock, date
from neustream.engine.events import Record
from neustream.engine.snapshot import KVUse
from neustream.server.backing import InstanceState
from neustream.server.observe.board import Board
from neustream.server.observe.gauges import Gauges
from neustream.server.observe.lives import Follower, Life, Lives
from neustream.server.observe.notes import Answered, Arrived, Note, Told
from neustream.server.observe.table import Children, Table

if TYPE_CHECKING:
    from neustream.server.observe.tracing import Tracer

RENDER_S = 0.25
"""It is rendered at most so often: some clients poll three times a second."""
LOOK_S = 0.05
"""How often it is seen how late the event loop is."""
MOST = 2000
"""Records that are counted at one go, so that streams need not wait for long."""
GENERATING = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/images/generations",
    "/v1/images/edits",
    "/inference",
)
"""Routes whose requests are served, or refused."""
OF_THE_ENGINE = ("unattainable", "crowded", "late", "cancelled", "expired", "slow_reader")
"""Codes of requests that were served, however it went."""
STATES = {"loading": "loading", "draining": "draining", "stopped": "draining", "closed": "draining"}
INSTANCE_STATES = ("up", "suspect", "draining")
FULL = {"queue_full": "queue_full", "wait": "wait"}


class Metrics(Follower):
    """An observer of the engine, and what routes tell of HTTP.

    On the engine's threads it only appends; all else is the event loop's.

    Args:
        models: that are served, by name.
        clock: for those who test.

    Attributes:
        lives: the open requests, as of the last `fold`.
        board, viewers: what the dashboard shows, and how many watch it.
        traced: whether somebody follows HTTP requests too.
    """

    def __init__(self, models: Sequence[str] = (), clock: Clock | None = None) -> None:
        self.table = Table()
        self.lives = Lives(models, [self])
        self.board = Board(self.lives.open)
        self.lives.followers.append(self.board)
        self.viewers = 0
        self.traced = False
        self._tracer: Tracer | None = None
        self._clock = clock or WallClock()
        self._feed: deque[Told] = deque()
        self._child = Children()
        self._page = b""
        self._rendered_at: float | None = None

    def follow(self, tracer: Tracer) -> None:
        """Have spans made of all requests."""
        self.traced = True
        self._tracer = tracer
        self.lives.followers.append(tracer)

    # -- from other threads -----------------------------------------------------------------------

    def __call__(self, record: Record) -> None:
        self._feed.append(record)

    def tell(self, note: Note) -> None:
        """A note of the front's, in order with the engine's records."""
        self._feed.append(note)

    # -- on the event loop ------------------------------------------------------------------------

    def fold(self, most: int | None = None) -> None:
        """Count what has been told; at most so many records."""
        left = len(self._feed) if most is None else min(most, len(self._feed))
        for _ in range(left):
            self.lives(self._feed.popleft())

    async def pulse(self) -> None:
        """Fold now and then, and see how late the event loop is; until it is cancelled."""
        while True:
            due = self._clock.now() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self.table.lag.observe(max(self._clock.now() - due, 0.0))
            self.fold(MOST)
            self.board.tick(self._clock.now())

    # -- of lives ---------------------------------------------------------------------------------

    def emitted(self, life: Life, gap_s: float | None) -> None:
        if life.kind != "text":
            return
        table, child, labels = self.table, self._child, (life.model, life.name)
        child(table.generation_tokens, life.model).inc()
        if gap_s is not None:
            child(table.itl, *labels).observe(gap_s)
            return
        assert life.first is not None
        child(table.ttft, *labels).observe(life.first - life.arrival)
        if life.prompt_tokens is not None:
            child(table.prompt_tokens, life.model).inc(life.prompt_tokens)

    def ended(self, life: Life) -> None:
        table, child, labels = self.table, self._child, (life.model, life.name)
        assert life.outcome is not None
        child(table.requests, *labels, life.outcome).inc()
        if life.outcome == "dropped":
            child(table.dropped, life.model, life.code).inc()
        self._promised(life)
        if life.began is not None:
            child(table.queue, *labels).observe(life.began - life.arrival)
        if life.done:
            child(table.e2e, *labels).observe(life.latency_s)
        if life.kind == "text":
            self._text(life)
        elif life.done and life.kind == "image":
            child(table.images, life.model).inc()
            child(table.image_steps, life.model).observe(life.steps)

    def _promised(self, life: Life) -> None:
        if not life.slo.promises or life.outcome == "cancelled":
            return
        table, child, labels = self.table, self._child, (life.model, life.name)
        if life.outcome == "on_time":
            child(table.slo_attained, *labels).inc()
        else:
            child(table.slo_missed, *labels, str(life.late)).inc()
        if life.done and life.slo.total < float("inf"):
            child(table.slack, *labels).observe(life.slo.total - life.latency_s)

    def _text(self, life: Life) -> None:
        table, child, labels = self.table, self._child, (life.model, life.name)
        child(table.request_generation, life.model).observe(life.outputs)
        if life.prompt_tokens is not None:
            child(table.request_prompt, life.model).observe(life.prompt_tokens)
        if life.done:
            child(table.request_success, life.model, life.finish).inc()
        if life.began is None or life.first is None or life.latest is None:
            return
        child(table.prefill, *labels).observe(life.first - life.began)
        child(table.decode, *labels).observe(life.latest - life.first)
        if life.outputs > 1:
            child(table.tpot, *labels).observe((life.latest - life.first) / (life.outputs - 1))

    def stepped(self, model: str, module: str, step: StepInfo, seconds: float) -> None:
        table, child = self.table, self._child
        child(table.step_batch, model, module).observe(len(step))
        child(table.step_latency, model, module).observe(seconds)
        if step.profiled_s > 0:
            child(table.step_ratio, model, module).observe(seconds / step.profiled_s)
        if step.preempted:
            child(table.preemptions, model).inc(len(step.preempted))
        if step.aside:
            child(table.offloads, model).inc(len(step.aside))

    # -- of HTTP ----------------------------------------------------------------------------------

    def arrived(self, id: str, route: str, headers: Mapping[str, str]) -> None:
        """A request came, for a route by its pattern."""
        if self.traced and route in GENERATING:
            carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
            self.tell(Arrived(id, route, carrier, date()))

    def answered(self, id: str, route: str, status: int, code: str, size: int) -> None:
        """It was answered, and had a body of so many bytes; `code`: of an error."""
        if self.traced and route in GENERATING:
            self.tell(Answered(id, status, code, date()))
        self._child(self.table.http_requests, route, str(status)).inc()
        if size:
            self.table.http_body.observe(size)
        if route not in GENERATING:
            return
        if status == 499:
            self.went("waiting")
        elif (reason := reason_of(status, code)) is not None:
            model = self.lives.models[0] if len(self.lives.models) == 1 else ""
            self._child(self.table.refused, model, reason).inc()
            self.board.refused(reason)
            self._child(self.table.requests, model, "", "refused").inc()

    def params(self, model: str, n: int, max_tokens: int) -> None:
        """A request asks for so much."""
        self._child(self.table.params_n, model).observe(n)
        self._child(self.table.params_max_tokens, model).observe(max_tokens)

    def streams(self, change: int) -> None:
        """A stream began (1) or ended (-1)."""
        self.table.http_streams.inc(change)

    def cut(self, status: int, code: str) -> None:
        """A stream ended before it was whole; 499: its client went away, or does not read."""
        self._child(self.table.cut, str(status)).inc()
        if code == "slow_reader":
            self.table.slow_readers.inc()
        elif status == 499:
            self.went("streaming")

    def went(self, when: str) -> None:
        """A client went away: `waiting` for the first byte, or `streaming`."""
        self._child(self.table.disconnects, when).inc()

    def unknown(self, count: int) -> None:
        """A body had so many fields that nobody knows."""
        self.table.unknown_fields.inc(count)

    def bad_headers(self, count: int) -> None:
        """So many headers of promises were not taken."""
        self.table.slo_header_invalid.inc(count)

    # -- the page ---------------------------------------------------------------------------------

    def serves(self, now: float) -> None:
        """On the engine's clock it is `now`."""
        if self._tracer is not None:
            self._tracer.zero = date() - now

    def loaded(self, load_s: float, warmup_s: float, backend: str, policy: str) -> None:
        """Models are there; `warmup_s` of `load_s` went into measuring them."""
        self.table.load.set(load_s)
        self.table.warmup.set(warmup_s)
        self.table.build_info.labels(version("neustream"), backend, policy).set(1)

    def render(self, gauges: Gauges) -> bytes:
        """All of them, as Prometheus reads them; what was rendered just now is told again."""
        now = self._clock.now()
        if self._rendered_at is None or now - self._rendered_at >= RENDER_S:
            self.fold()
            self._set(gauges)
            self._page = generate_latest(self.table.registry)
            self._rendered_at = now
        return self._page

    def snapshot(self, gauges: Gauges, since: int = 0) -> dict[str, Any]:
        """What the dashboard shows; see `Board.snapshot`."""
        self.fold()
        self.board.tick(self._clock.now())
        return self.board.snapshot(gauges, since)

    def _set(self, gauges: Gauges) -> None:
        table = self.table
        table.ready.set(gauges.state == "ready")
        table.draining.set(gauges.state == "draining")
        table.policy_faults.set(gauges.policy_faults)
        table.http_connections.set(gauges.connections)
        table.tasks.set(_tasks())
        self._set_kv(gauges.kv)
        self._set_instances(gauges.instances)
        for model in self.lives.models or ("",):
            lives = [life for life in self.lives.open.values() if life.model == model]
            run = sum([life.running for life in lives])
            self._child(table.running, model).set(run)
            self._child(table.waiting, model).set(len(lives) - run)
        due = [life.due for life in self.lives.open.values() if life.due < float("inf")]
        slacks = [each - gauges.now for each in due] or [float("nan")]
        table.slack_min.set(min(slacks))
        table.slack_median.set(statistics.median(slacks))

    def _set_kv(self, kv: Mapping[str, KVUse]) -> None:
        for node, use in kv.items():
            model, _ = self.lives.module_of(node)
            self._child(self.table.kv_usage, model).set(use.used / use.blocks)
            self._child(self.table.kv_slots, model).set(use.used)

    def _set_instances(self, instances: Mapping[str, InstanceState]) -> None:
        """How many there are in each state, and what each has; those that are gone are not told of."""
        table = self.table
        for gauge in (table.instance_live, table.instance_backlog, table.outlook_age):
            gauge.clear()
        for name, instance in instances.items():
            table.instance_live.labels(name).set(instance.live)
            table.instance_backlog.labels(name).set(instance.backlog_s)
            table.outlook_age.labels(name).set(instance.told_ago_s)
        for state in INSTANCE_STATES if instances else ():
            table.instances.labels(state).set(sum([each.state == state for each in instances.values()]))


def _tasks() -> int:
    """Tasks of this thread's event loop; 0 without one."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0


def reason_of(status: int, code: str) -> str | None:
    """Why a request was refused by its answer; None if it was not: the engine had it."""
    if status < 400 or code in OF_THE_ENGINE or status in (499, 500, 504):
        return None
    if status in (401, 403):
        return "auth"
    if status == 503:
        return STATES.get(code, "failed")
    if status == 429:
        return FULL.get(code, "limit")
    return "invalid"
