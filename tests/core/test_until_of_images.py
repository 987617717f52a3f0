"""`priced` says until when a step of images stands, and decides as if it were asked before each."""

from __future__ import annotations

import math
import random

import pytest
from counted import Counted
from priced_images import EVERY, IMAGE, LOOP, OTHER, PROFILES, READ, SIZED, ask, run, waiting
from toys import engine

from neustream import SLO, Graph, Pool, Priced, Request, Scheduler, Stage, loop
from neustream.engine.events import Started
from neustream.engine.executor import ProfiledExecutor

PAGES = Graph("pages", loop(READ, times=lambda job: job.params["steps"]))
STREAM = Graph("stream", loop(Stage("unet", max_batch=4, emits=True), times=lambda job: job.params["steps"]))


def until(some, now=0.0):
    """Until when `priced` says that its next step stands."""
    pool = some._pools["gpu"]
    view = some._dispatch._views.now(pool, now, 0, pool.waiting(0))
    return Priced().decide(view).until


def begun(*requests, now=0.0):
    some = waiting(*requests)
    return some, run(some, *[request.id for request in requests], now=now)


def test_it_stands_until_the_turns_would_be_too_late():
    some, now = begun(ask("r0", 4, 6.5), ask("r1", 4, 6.0))
    assert now == 1.25  # three turns of 1.25 s are left, which may take 1.05 times as long: 3.9375 s
    assert until(some, now) == pytest.approx(2.0625)
    assert until(some, 1.7) == pytest.approx(2.0625)
    assert until(some, 2.1) == -math.inf


@pytest.mark.parametrize(
    "requests",
    [
        [ask("r0", 4, 2.9), ask("r1", 3, 20.0)],  # on seats
        [ask(f"r{number}", 9, 40.0) for number in range(4)],  # three at a time
        [ask("r0", 4, 20.0), ask("r1", 4)],  # one without a deadline
        [ask("r0", 4, 20.0, first=19.0)],
        [ask("r0", 4, 20.0, graph=STREAM, first=20.0, step=5.0)],
    ],
)
def test_it_does_not_stand_where_time_changes_what_is_decided(requests):
    some = waiting(*requests)
    names = [request.id for request in requests]
    now = run(some, *names[:3])
    assert until(some, now) == -math.inf


def test_neither_beside_newcomers_nor_at_other_models_nor_where_steps_have_sizes():
    some, now = begun(ask("r0", 4, 9.0))
    some.submit(ask("r1", 4, 3.0, arrival=now), now)
    assert until(some, now) == -math.inf
    some = waiting(ask("r0", 4, 20.0), ask("r1", 4, 20.0, graph=OTHER))
    now = run(some, "r1", now=run(some, "r0"))
    assert until(some, now) == -math.inf
    some = waiting(ask("r0", 4, 20.0, graph=PAGES))
    assert until(some, run(some, "r0")) == -math.inf


def drawn(seed, count=60):
    """A load below and above what one device serves, some of it tight and some loose."""
    random_ = random.Random(seed)
    now, requests = 0.0, []
    for number in range(count):
        now += random_.expovariate(random_.choice([0.1, 0.3]))
        steps = random_.randint(2, 12)
        due = now + 1.0 + steps * random_.choice([1.3, 2.0, 6.0])
        graph = random_.choice([LOOP, IMAGE])
        requests.append(ask(str(number), steps, due, arrival=now, graph=graph))
    return requests


def served(requests, rule, stretch):
    """The steps of a run, with when each began."""
    steps = []

    def see(record):
        if isinstance(record, Started):
            steps.append((record.step.ids, record.at))

    executor = ProfiledExecutor(stretch=stretch)
    engine(EVERY, PROFILES, rule, executor=executor, observers=[see]).run(requests)
    return steps


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_steps_are_those_of_a_rule_that_is_asked_each_time(seed, noise):
    requests = drawn(seed)

    def stretch():
        random_ = random.Random(seed)
        return lambda *about: 1 + noise * random_.random()

    seldom, often = Counted(), Counted(always=True)
    assert served(requests, seldom, stretch()) == served(requests, often, stretch())
    assert seldom.asked < 0.85 * often.asked


def test_what_steps_take_now_has_it_asked():
    some, now = begun(ask("r0", 30, 400.0))
    rule = Counted()
    some._pools["gpu"].policy = rule
    for _ in range(3):
        batch = some.next_batch("gpu", now)
        now += 1.0
        some.finish(batch, [{}], now)
    assert rule.asked == 1
    for speed, asked in [(1.04, 1), (0.9, 1), (1.06, 2)]:
        some.times.speed = {**some.times.speed, "unet": speed}
        finish(some, now)
        assert rule.asked == asked


def finish(some, now):
    """One step, which takes no time."""
    batch = some.next_batch("gpu", now)
    some.finish(batch, [{}] * len(batch), now)


def test_each_step_that_ran_puts_it_off_by_what_it_should_take():
    """There are 1.15 s to spare, and steps take 1 s: the fourth comes 2 s late, and is asked about."""
    some, now = begun(ask("r0", 20, 22.1))
    rule = Counted()
    some._pools["gpu"].policy = rule
    for asked in (1, 1, 1):
        finish(some, now)
        now += 1.0
        assert rule.asked == asked
    finish(some, now + 2.0)
    assert rule.asked == 2


def test_who_begins_anew_has_it_asked():
    """They are at the stage where they were, with more steps left, and are not promised anything now."""
    rule = Counted()
    some = Scheduler([Pool("gpu", tuple(PROFILES))], rule, PROFILES)
    for request in [ask("r0", 8, 20.0), ask("r1", 8, 20.0)]:
        some.submit(request, 0.0)
    now = 0.0
    for _ in range(3):
        batch = some.next_batch("gpu", now)
        now += batch.expected
        some.finish(batch, [{}, {}], now)
    asked = rule.asked
    some.requeue(some.next_batch("gpu", now), now + 0.1, "state")
    assert rule.asked == asked, "as before the step stands"
    some.next_batch("gpu", now + 0.1)
    assert rule.asked == asked + 1


class Drawn:
    """A run of one scheduler, in which much happens beside steps; the same for a seed, if the same steps run."""

    def __init__(self, seed, rule, workers):
        self.random = random.Random(seed)
        self.graphs = self.random.choice([[LOOP], [LOOP, IMAGE], [LOOP, SIZED], [LOOP, OTHER], [IMAGE, OTHER, PAGES]])
        self.gap, self.loose = self.random.choice([(9.0, 3.0), (14.0, 6.0), (30.0, 3.0)])
        self.noise, self.slow = self.random.choice([0.0, 0.0, 0.3]), self.random.choice([1.0, 1.0, 1.6])
        self.some = Scheduler([Pool("gpu", tuple(PROFILES), workers)], rule, PROFILES, correct=True)
        self.steps, self.running, self.came = [], {}, 0

    def run(self, count):
        """Who began when, in so many turns."""
        next_at, now = 0.0, 0.0
        for _ in range(count):
            while next_at <= now:
                self.submit(next_at)
                next_at += self.random.expovariate(1 / self.gap)
            self.meddle(now)
            for worker in range(self.some.pools["gpu"].workers):
                if worker not in self.running:
                    self.start(now, worker)
            now = min([over for over, _ in self.running.values()], default=next_at)
            for worker in [worker for worker, (over, _) in self.running.items() if over <= now]:
                self.end(self.running.pop(worker)[1], now)
        return self.steps

    def submit(self, now):
        steps = self.random.randint(4, 16)
        due = now + 1.0 + steps * self.random.uniform(1.3, 2 * self.loose)
        slo = SLO(due - now if self.random.random() < 0.95 else math.inf)
        graph = self.random.choice(self.graphs)
        self.some.submit(Request(f"r{self.came}", graph, now, slo, {"steps": steps}), now)
        self.came += 1

    def meddle(self, now):
        """Now and then somebody is cancelled, held, or goes on."""
        what, ids = self.random.random(), sorted(self.some.requests)
        if what > 0.06 or not ids:
            return
        id = self.random.choice(ids)
        if what < 0.03:
            self.some.cancel(id, now)
        elif self.some._lives.jobs[id].keep:
            self.some.resume(id)
        else:
            self.some.hold(id, now)
            if what < 0.045:
                self.some.resume(id)

    def start(self, now, worker):
        batch = self.some.next_batch("gpu", now, worker)
        if batch is None:
            return
        self.steps.append((now, worker, batch.stage, [job.id for job in batch.jobs]))
        takes = batch.profiled * (1 + self.noise * self.random.random())
        takes *= self.slow if now % 200 < 80 else 1.0
        self.running[worker] = (now + takes, batch)

    def end(self, batch, now):
        if self.random.random() < 0.05:
            self.some.requeue(batch, now, self.random.choice(["nothing", "state"]))
        else:
            self.some.finish(batch, [{}] * len(batch), now)


@pytest.mark.parametrize("workers", [1, 2])
def test_much_may_happen_between_steps(workers):
    saved = 0
    for seed in range(12):
        seldom, often = Counted(), Counted(always=True)
        few = Drawn(seed, seldom, workers).run(250)
        assert few == Drawn(seed, often, workers).run(250), seed
        saved += often.asked - seldom.asked
    assert saved > 300 if workers == 1 else saved == 0
