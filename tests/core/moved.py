"""Jobs that move between two schedulers, for tests."""

from __future__ import annotations

import pickle
from collections import Counter

from hypothesis import strategies as st
from walks import free

from neustream import (
    FCFS,
    SLO,
    Graph,
    LinearProfile,
    Pool,
    Request,
    RequestError,
    Scheduler,
    Stage,
    TableProfile,
    loop,
    seq,
)
from neustream.core.events import Emitted, Ended
from neustream.core.steps import StepProfile

STAGES = [Stage("encode", 2), Stage("denoise", 4), Stage("decode", 3, emits=True)]
PROFILES = {
    "encode": LinearProfile("encode", base=0.25, max_batch=2),
    "denoise": TableProfile("denoise", [1, 2, 4], [1.0, 1.125, 1.5]),
    "decode": LinearProfile("decode", base=0.25, per_job=0.25, max_batch=4),
}
STEPS = StepProfile(
    "llm",
    LinearProfile("p", base=0.25, per_size=0.0625, max_batch=8),
    LinearProfile("d", base=0.25, per_job=0.0625, max_batch=8),
)
slos = st.sampled_from([SLO(), SLO(total=12.0), SLO(total=60.0), SLO(total=40.0, first=20.0)])
anything = st.builds(
    lambda nodes, times, last: seq(*nodes, loop(STAGES[1], times=times), last),
    st.lists(free(STAGES), min_size=1, max_size=3),
    st.integers(1, 5),
    free(STAGES),
)


class Twins:
    """Two schedulers that jobs move between at random, and what was seen of each job."""

    def __init__(self, make, graphs, draw):
        self.schedulers, self.graphs, self.draw = [make(), make()], graphs, draw
        self.now = 0.0
        self.calls, self.outputs, self.ends = {}, {}, Counter()
        self.status, self.moves = {}, 0
        self.owner = {}

    def submit(self, id, slo, params, side=0):
        self.calls[id], self.outputs[id] = [], []
        self.owner[id] = side
        self.schedulers[side].submit(Request(id, self.graphs[side], self.now, slo, params), self.now)
        self.events()

    def run(self, pool, update, cached=False):
        """Steps on both sides, with moves before, during and after them, until all jobs have ended."""
        for _ in range(4000):
            if not any(scheduler.jobs for scheduler in self.schedulers):
                return
            for side, scheduler in enumerate(self.schedulers):
                self.some_leave(side, cached)
                batch = scheduler.next_batch(pool, self.now)
                self.events()
                if batch is None:
                    continue
                for job in batch.jobs:
                    self.calls[job.id].append(job.stage.name)
                for job in self.draw.sample(batch.jobs, len(batch.jobs) // 2):
                    scheduler.hold(job.id, self.now)
                self.now += batch.expected
                scheduler.finish(batch, [update(job) for job in batch.jobs], self.now)
                self.events()
            self.now += 0.125
        raise AssertionError("jobs are still open")

    def some_leave(self, side, cached):
        scheduler, other = self.schedulers[side], self.schedulers[1 - side]
        for id, job in list(scheduler.jobs.items()):
            if job.status != "held" and self.draw.random() < 0.7:
                continue
            if job.status == "held" and self.draw.random() < 0.2:
                scheduler.resume(id)
                continue
            kept = job.num_blocks and job.kept
            carry = scheduler.give(id, self.now)
            assert id not in scheduler.jobs and job.status == "gone" and not job.num_blocks
            assert carry.kept == kept
            carry = pickle.loads(pickle.dumps(carry))
            bring = cached and self.draw.random() < 0.7
            try:
                other.take(carry, self.graphs[1 - side], self.now, cached=bring)
            except RequestError:  # no blocks for what it kept: without them there is always room
                assert bring
                other.take(carry, self.graphs[1 - side], self.now)
            self.owner[id] = 1 - side
            self.moves += 1
        self.events()

    def events(self):
        for scheduler in self.schedulers:
            for event in scheduler.pop_events():
                if isinstance(event, Emitted):
                    assert event.index == len(self.outputs[event.id])
                    self.outputs[event.id].append(event.update)
                elif isinstance(event, Ended):
                    self.ends[event.id] += 1
                    self.status[event.id] = event.status, event.reason


IMAGE = Graph("image", seq(STAGES[0], loop(STAGES[1], times=4), STAGES[2]))


def scheduler_of(graph=IMAGE, policy=None, **options):
    pools = [Pool("gpu", tuple(graph.stages))]
    return Scheduler(pools, policy or FCFS(), PROFILES, **options)


def one_step(scheduler, now, took=1.0, update=None):
    batch = scheduler.next_batch("gpu", now)
    assert batch is not None
    scheduler.finish(batch, [update or {} for _ in batch.jobs], now + took)
    return batch
