"""The lives of jobs between steps: they enter stages, emit outputs, lose their blocks, and end."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Literal

from neustream.core.batch import read_update
from neustream.core.carry import Carry, unpack
from neustream.core.cursor import Cursor
from neustream.core.demand import Demand, Recent
from neustream.core.entry import Entry
from neustream.core.events import Ending, Event, Held, Left, Update, ended
from neustream.core.forks import Forks, emitted, tell
from neustream.core.graph import Graph, Stage
from neustream.core.holding import Holding
from neustream.core.job import Status
from neustream.core.policy import Unpromised
from neustream.core.pool_state import PoolState
from neustream.core.pools import Pools
from neustream.core.registry import Registry
from neustream.core.step_times import StepTimes
from neustream.core.types import TICK, Request
from neustream.core.work import Work, ends_call, learn_length
from neustream.errors import GraphError, NeustreamError, RequestError

Lost = Literal["nothing", "cache", "state"]
"""What a step that was lost took with it: KV blocks, or all that earlier steps returned."""


class Lives:
    """The live jobs of a scheduler.

    Attributes:
        jobs: by id; events: what became of them, until somebody takes the list away.
        pools: of its scheduler, by name; pool_of: the one that serves a stage.
        unpromised: live jobs without a promise; work: what lies ahead of jobs.
    """

    def __init__(self, pools: Pools, times: StepTimes, recent: Recent, away: Set[str]) -> None:
        self.pools = pools
        self.jobs: dict[str, Entry] = {}
        self.events: list[Event] = []
        self.pool_of: dict[str, PoolState] = {}
        self.unpromised = 0
        self._holding = Holding(self.pool_of)
        self._recent = recent
        self.work = Work(times, recent.lengths)
        self.forks = Forks(self, self._begin, self._go_on)
        self._registry = Registry(self.pool_of, away)

    # -- coming -----------------------------------------------------------------------------------

    def begin(self, request: Request, now: float) -> Entry:
        """A new job, at the first stage of its graph."""
        self._check(request.id, request.graph)
        job = Entry(request)
        job.history = self._recent.seen
        job.cursor = Cursor(request.graph, job)
        self.work.legs.check(job)
        self.enlist(job)
        with self._forgotten_if_it_fails(job):
            if job.cursor.fork is not None:  # where it forks at once, what is ahead is split there
                self.work.measure(job)
                self._planned(job)
                self._go_to(job, None, now)
                return job
            self._begin(job, now)
            self._planned(job)
        return job

    def _planned(self, job: Entry) -> None:
        """Note what is ahead of a job that has just come."""
        job.alone_s, job.planned_calls = job.remaining_s, dict(job.calls_left)
        self._recent.add(Demand.of(job))

    def _begin(self, job: Entry, now: float) -> None:
        """A job, or a branch, comes to its first stage."""
        assert job.cursor is not None
        self.work.legs.begin(job, now)
        self._go_to(job, job.cursor.stage, now)

    def adopt(self, carry: Carry, graph: Graph, now: float, cached: bool) -> Entry:
        """A job that was given by another scheduler, where it was."""
        self._check(carry.id, graph)
        job = unpack(carry, graph, now, self._recent.seen)
        stage = None if job.cursor is None else job.cursor.stage
        if stage is None:
            raise GraphError(f"request {carry.id!r} is at the end of graph {graph.name!r}")
        state = self.pool_of.get(stage.name)
        if cached and state is not None:
            state.check_room(carry, stage)
        began = carry.started_ago is not None
        anew = not cached and stage.caches and bool(began or job.computed)
        if anew:
            stage, job.computed = _refilling(job, stage), 0.0
        self.enlist(job)
        with self._forgotten_if_it_fails(job):
            self._enter(job, stage, now)
        if carry.leg is None:
            self.work.legs.begin(job, now)
        if began:
            job.worker = 0
        if not anew:
            job.base -= carry.skipped
        if cached:
            self._holding.set_tokens(job, carry.kept)
        return job

    def live(self, id: str, what: str) -> Entry:
        """The job `id`; RequestError, for what was wanted, if it is not being served."""
        job = self.jobs.get(id)
        if job is None:
            raise RequestError(f"{what}: no request {id!r} is being served here")
        return job

    def _check(self, id: str, graph: Graph) -> None:
        """RequestError for an id that is being served, GraphError for a graph that is not."""
        if id in self.jobs:
            raise RequestError(f"request id {id!r} is already being served")
        self._registry.check(graph)

    @contextmanager
    def _forgotten_if_it_fails(self, job: Entry) -> Iterator[None]:
        """A job that cannot be begun leaves nothing behind."""
        try:
            yield
        except BaseException:
            self.forget(job)
            raise

    def enlist(self, job: Entry) -> None:
        """One more live job."""
        self.jobs[job.id] = job
        self.unpromised += not job.promised

    # -- on the way -------------------------------------------------------------------------------

    def move(self, job: Entry, update: Update, size: float, now: float) -> None:
        """Take in what a step of `size` returned, and go on to the next stage.

        The user's own `size`, `times`, `until` and `on` are asked: what they raise fails the job.
        """
        stage, cursor = job.stage, job.cursor
        assert stage is not None and cursor is not None
        try:
            # Before the update, which may change it. A decode cannot be parted.
            parted = stage.size is not None and stage.phase != "decode"
            whole = job.size if parted else 0.0
            if type(update) is not dict:
                read_update(job, stage.name, update)
            elif update:
                job.state.update(update)
            if size < whole:
                job.computed += size
                self.work.measure(job)
                return
            job.computed = 0.0
            if stage.emits:
                self._emit(job, stage, update, now)
            if cursor.again(job):
                self.work.one_call_done(job, stage)
            else:
                self._go_to(job, cursor.advance(job, now=now), now)
        except NeustreamError as error:
            self.end(job, "failed", str(error), now)

    def _emit(self, job: Entry, stage: Stage, update: Update, now: float) -> None:
        late = job.take_output(update, now)
        self.events.append(emitted(job, update, late, now))
        if job.request.graph.collects:
            tell(job, update, late, now)
        if stage.phase != "step":
            self._recent.lengths_of(stage.model).reached(job.call_outputs)

    def _go_to(self, job: Entry, stage: Stage | None, now: float) -> None:
        """Leave the present stage for `stage`; None is the end of the graph."""
        left = job.stage
        legs = bool(job.request.graph.legs) and left is not None
        another = legs and left is not None and self.work.legs.over(job, left)
        freed = left is not None and ends_call(job.request.graph, left, stage)
        if another:
            self.events.append(self.work.legs.end(job, now, freed=freed))
        if left is not None and freed:
            learn_length(job, left, self._recent.lengths_of(left.model))
            self._holding.set_tokens(job, 0)
            job.call_outputs = 0
        if stage is not None:
            if another:
                job.call_outputs = 0
                self.work.legs.promise(job, now, now)
            job.computed = stage.known_of(job)
            self._enter(job, stage, now)
            return
        if job.cursor is not None and job.cursor.fork is not None:
            job.leg, job.call_outputs = "", 0
            self.forks.open(job, now)
            return
        job.take_end(now)
        self.end(job, "done", "", now)

    def _go_on(self, job: Entry, stage: Stage | None, now: float) -> None:
        """Go on behind a join."""
        if stage is not None and job.request.graph.legs:
            self.work.legs.promise(job, now, now)
        self._go_to(job, stage, now)

    def _enter(self, job: Entry, stage: Stage, now: float) -> None:
        """Make `stage` the job's own, at the end of its queue if it was at another one."""
        left, job.stage = job.stage, stage
        self.work.measure(job)
        state = self.pool_of.get(stage.name)
        blocks = None if state is None else state.blocks_at(stage)
        if blocks is not None and not blocks.fits(job):
            raise RequestError(blocks.misfit(job))
        if stage is left:
            return
        if left is not None and self.pool_of.get(left.name) is not state:
            job.worker = -1
        job.queue.drop(job)
        if state is None:
            job.become("away")
            self.events.append(Left(job.id, stage.name, now))
            return
        state.note(job)
        queue = state.queues[stage.name]
        queue.add(job)
        job.queue, job.joined_at = queue, now
        job.base, job.round = queue.rounds, -1

    def preempt(self, job: Entry, now: float, *, aside: bool = False) -> None:
        """Take the KV blocks of a waiting job: it goes back to the prefill that fills them.

        `aside`: what was in them is kept in the host's memory if there is room, and known then.
        """
        left, kept = job.stage, job.kept if aside else 0.0
        assert left is not None
        self._holding.set_tokens(job, 0)
        job.computed = 0.0
        try:
            stage = _refilling(job, left)
            if aside:
                job.computed = self._holding.put_aside(job, stage, kept)
            self._enter(job, stage, now)
        except NeustreamError as error:
            self.end(job, "failed", str(error), now)

    def lose(self, job: Entry, lost: Lost, now: float) -> None:
        """Go on with what is left of a job whose step was lost."""
        if lost == "state":
            self.restart(job.root, now)
        elif lost == "cache" and job.stage is not None and job.stage.caches:
            self.preempt(job, now)
        else:
            self._holding.set_tokens(job, job.kept)

    def restart(self, job: Entry, now: float) -> None:
        """A job's state is lost: it waits at the start of its graph."""
        self.forks.close(job, now)
        self._holding.set_tokens(job, 0)
        if job.status == "forked":
            job.become("waiting")
        try:
            job.restart()
            assert job.cursor is not None
            self.work.legs.begin(job, now)
            if job.cursor.stage is None:
                self._go_to(job, None, now)
            else:  # no generation has come to its end by this
                self._enter(job, job.cursor.stage, now)
        except NeustreamError as error:
            self.end(job, "failed", str(error), now)

    def measure_again(self, stage: str) -> None:
        """The latencies of a stage changed."""
        for job in self.jobs.values():
            if stage in job.calls_left:
                self.work.measure(job)

    # -- waiting apart ----------------------------------------------------------------------------

    def hold(self, job: Entry, now: float) -> None:
        """Keep a job out of all steps, at once if it waits, else from the end of its step on.

        One that has forked is held at its join.
        """
        if job.branch:
            raise RequestError(
                f"hold: {job.id!r} is a branch of request {job.root.id!r}; hold that"
            )
        job.keep = True
        self.pools.none_stands()
        if job.status == "waiting":
            job.become("held")
            assert job.stage is not None
            self.pool_of[job.stage.name].out += 1
            self.events.append(Held(job.id, now))

    def resume(self, job: Entry) -> None:
        """Let a held job run again; RequestError if it is not held."""
        if not job.keep:
            raise RequestError(f"resume: request {job.id!r} is not held")
        job.keep = False
        if job.status == "held":
            job.become("waiting")
            assert job.stage is not None
            state = self.pool_of[job.stage.name]
            state.out -= 1
            state.note(job)

    def settle(self, job: Entry, now: float) -> None:
        """Carry out a cancellation or a hold that came while the job ran."""
        if job.status != "waiting":
            return
        if job.ending is not None:
            self.end(job, *job.ending, now)
        elif job.keep:
            self.hold(job, now)

    # -- going ------------------------------------------------------------------------------------

    def give_up(self, job: Entry, reason: str, now: float) -> None:
        """A policy gives a job up: it ends, or goes on without its promise if its SLO says so."""
        if self.jobs.get(job.id) is not job:  # another branch of its request was given up
            return
        if job.promised and job.slo.finish:
            self.pools.none_stands()
            for one in list(self.forks.family(job)):
                if one.promised:
                    one.release()
                    self.unpromised += 1
        else:
            self.end(job, "dropped", reason, now)

    def end_soon(self, id: str, status: Status, reason: str, now: float) -> bool:
        """End a job, after its step if it is in one; False if there is none to end."""
        job = self.jobs.get(id)
        if job is None or job.ending is not None:
            return False
        if job.status != "running":
            self.end(job, status, reason, now)
            return True
        job.ending = (status, reason)
        state = None if job.stage is None else self.pool_of.get(job.stage.name)
        if state is not None:
            self.pools.none_stands()
            self.events.append(Ending(job.root.id, job.id, state.pool.name, now))
        return True

    def end(self, job: Entry, status: Status, reason: str, now: float) -> None:
        """A job is over: it leaves its queue, its blocks are free, and its branches end."""
        self.forks.close(job, now)
        self.forget(job)
        if job.leg and status != "done":
            self.events.append(self.work.legs.end(job, now, status))
        job.become(status)
        job.reason, job.ended_at = reason, now
        if status == "done" and job.due < now - TICK:
            job.late = True
        state = job.state
        job.stage = job.cursor = None
        job.state = {}
        job.calls_left = {}
        if job.branch:
            own = state.maps[0] if isinstance(state, ChainMap) else {}
            self.forks.ended(job, status, own, now)
        else:
            self._recent.ended(job, now)
            self.events.append(ended(job, now))

    def forget(self, job: Entry) -> None:
        """Take a job out of everything; its own facts stay."""
        if self.jobs.pop(job.id, None) is None:
            return
        self._holding.set_tokens(job, 0)
        job.queue.drop(job)
        state = None if job.stage is None else self.pool_of.get(job.stage.name)
        if state is not None:
            state.note(job)
            state.out -= job.status == "held"
        if job.promised:
            return
        self.unpromised -= 1
        if not self.unpromised:
            for state in self.pool_of.values():
                state.unpromised = Unpromised()


def _refilling(job: Entry, stage: Stage) -> Stage:
    """The stage that fills the KV cache which a job at `stage` lacks; GraphError if none does."""
    assert job.cursor is not None
    found = job.cursor.rewind() if stage.phase == "decode" else stage
    if found is None:
        raise GraphError(
            f"request {job.id!r}: no stage before {stage.name!r} fills its KV cache again"
        )
    return found
