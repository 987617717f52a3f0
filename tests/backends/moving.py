"""Two schedulers with modules of their own, and jobs that move from one to the other."""

from __future__ import annotations

import pickle

from neustream import FCFS, Pool, Request, Scheduler, TableProfile, ThreadExecutor, WallClock
from neustream.core.batch import input_of
from neustream.core.events import Emitted, Ended


class Host:
    """A scheduler and the modules that it has steps run by, step by step.

    `outputs` are the updates that requests emitted, `ended` their results by id.
    """

    def __init__(self, graph, modules, *, profiles=None, policy=None, **pool):
        stages = tuple(graph.stages)
        sizes = range(1, 17)
        profiles = profiles or {name: TableProfile(name, sizes, [1.0] * 16) for name in stages}
        served = Pool("gpu", stages, **pool)
        self.graph = graph
        self.scheduler = Scheduler([served], policy or FCFS(), profiles)
        self.executor = ThreadExecutor(modules)
        self.outputs, self.ended = {}, {}
        self._clock = WallClock()
        self._now = 0.0

    def submit(self, id, params):
        self.scheduler.submit(Request(id, self.graph, params=params), self._now)

    def step(self):
        """One step; False if there is none to take."""
        batch = self.scheduler.next_batch("gpu", self._now)
        self._settle()
        if batch is None:
            return False
        for job in batch.preempted:
            self.executor.release(job.id)
        self.executor.start(batch, self._clock)
        [done] = self._clock.wait()
        if isinstance(done.results, BaseException):
            raise done.results
        self._now += 1.0
        self.scheduler.finish(batch, done.results, self._now)
        self._settle()
        return True

    def steps(self, count):
        for _ in range(count):
            assert self.step()

    def finish(self):
        while self.scheduler.jobs:
            assert self.step()

    def close(self):
        self.executor.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _settle(self):
        for event in self.scheduler.pop_events():
            if isinstance(event, Emitted):
                self.outputs.setdefault(event.id, []).append(event.update)
            if isinstance(event, Ended):
                self.executor.release(event.id)
                self.ended[event.id] = event

    # -- moves ------------------------------------------------------------------------------------

    def leave(self, id, *, keep=True):
        """Hold a request, and give it with what modules keep of it (or without), as pickled bytes."""
        self.scheduler.hold(id, self._now)
        pieces = self.executor.export(input_of(self.scheduler.jobs[id])).result() if keep else {}
        carry = self.scheduler.give(id, self._now)
        self.executor.release(id)
        return pickle.dumps((carry, pieces))

    def arrive(self, moved):
        """Adopt what left another host; returns the pieces."""
        carry, pieces = pickle.loads(moved)
        self.executor.adopt(carry.input(), pieces).result()
        self.scheduler.take(carry, self.graph, self._now, cached=bool(pieces))
        return pieces
