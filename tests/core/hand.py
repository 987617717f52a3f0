"""What tests of the core share: a policy that does what a test tells it, and reads of what it was shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from neustream import Batch, Decision, Graph, Job, Policy, Request, Scheduler, Stage, View
from neustream.core.cursor import Cursor
from neustream.core.events import Ended, Event
from neustream.core.queues import Queue


class Hand:
    """Decides by `choose`, which the test sets; keeps the last view. Without one it waits a second."""

    def __init__(self, choose: Callable[[View], Decision] | None = None) -> None:
        self.choose = choose or (lambda view: Decision(wake_at=view.now + 1.0))
        self.view: View | None = None

    def decide(self, view: View) -> Decision:
        self.view = view
        return self.choose(view)


def set_policy(scheduler: Scheduler, policy: Policy) -> None:
    """Let `policy` decide for all pools from now on."""
    for state in scheduler._pools.values():
        state.policy = policy


def seen(scheduler: Scheduler, now: float = 0.0, worker: int = 0, pool: str = "gpu") -> View:
    """What a policy is shown there and then."""
    hand = Hand()
    scheduler.next_batch(pool, now, worker, instead=hand)
    return hand.view


def chosen(policy: Policy, scheduler: Scheduler, now: float = 0.0, worker: int = 0) -> list[str]:
    """Whom `policy` would run there and then."""
    return ids(policy.decide(seen(scheduler, now, worker)).jobs)


def dropped(policy: Policy, scheduler: Scheduler, now: float = 0.0, worker: int = 0) -> list[str]:
    """Whom `policy` would drop there and then."""
    return ids(policy.decide(seen(scheduler, now, worker)).drop)


def begin(scheduler: Scheduler, *names: str, now: float = 0.0, worker: int = 0) -> Batch:
    """Start a step of the named jobs."""
    named = Hand(lambda view: Decision([job for job in view.jobs if job.id in names]))
    batch = scheduler.next_batch("gpu", now, worker, instead=named)
    assert sorted(job.id for job in batch.jobs) == sorted(names)
    return batch


def ids(jobs: Iterable[Job]) -> list[str]:
    return [job.id for job in jobs]


def facts(events: Iterable[Event]) -> list[tuple[str, str, str, float]]:
    """(id, status, reason, instant) of events that are all ends."""
    assert all(type(event) is Ended for event in events)
    return [(event.id, event.status, event.reason, event.at) for event in events]


def free_blocks(scheduler: Scheduler, pool: str = "gpu") -> int:
    """KV blocks of a pool that nobody holds."""
    return scheduler._pools[pool].blocks["llm"].free


LIVE = (Job, Queue, Batch, Scheduler, Request, Graph, Stage, Cursor)


def live_parts(value: object, path: str = "record") -> list[str]:
    """Where in a record, its fields and theirs, something lives on that others change or keep."""
    if isinstance(value, LIVE):
        return [f"{path}: {type(value).__name__}"]
    inner: Iterable[tuple[str, object]] = ()
    if dataclasses.is_dataclass(value):
        if not value.__dataclass_params__.frozen:
            return [f"{path}: {type(value).__name__} is not frozen"]
        inner = [(f"{path}.{one.name}", getattr(value, one.name)) for one in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        inner = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [(f"{path}[{at}]", item) for at, item in enumerate(value)]
    return [found for name, item in inner for found in live_parts(item, name)]
