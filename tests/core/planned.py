"""A scheduler whose next step is planned while one is under way, for tests."""

from __future__ import annotations

from math import inf

from neustream import (
    FCFS,
    SLO,
    Graph,
    LinearProfile,
    Policy,
    Pool,
    Request,
    Scheduler,
    Stage,
    loop,
    seq,
)
from neustream.core.batch import Batch
from neustream.core.steps import PrefillTable, StepProfile

STEP = Stage("step", max_batch=4)
LAST = Stage("last", max_batch=4, emits=True)
COUNTED = Graph("counted", seq(loop(STEP, times=lambda job: job.params["steps"]), LAST))
PROFILES = {
    "step": LinearProfile("step", base=0.75, per_job=0.25, max_batch=4),
    "last": LinearProfile("last", base=0.5, max_batch=4),
}
TOKENS = StepProfile(
    "llm",
    PrefillTable("prefill", [1, 100], [0.5, 0.75], (0.5, 0.0025, 0.0)),
    LinearProfile("decode", base=0.5, per_size=0.015625, max_batch=4),
)


def scheduler(policy: Policy | None = None, **pool: object) -> Scheduler:
    return Scheduler([Pool("gpu", ("step", "last"), **pool)], policy or FCFS(), PROFILES)


def request(id: str, *, steps: int = 3, arrival: float = 0.0, total: float = inf) -> Request:
    return Request(id, COUNTED, arrival, SLO(total=total), {"steps": steps})


def start(tested: Scheduler, *requests: Request, now: float = 0.0) -> Batch:
    for each in requests:
        tested.submit(each, now)
    batch = tested.next_batch("gpu", now)
    assert batch is not None
    return batch


def over(tested: Scheduler, batch: Batch, at: float | None = None, **update: object) -> float:
    """End a step when it should, or `at`; all of its jobs return `update`."""
    now = batch.started_at + batch.expected if at is None else at
    tested.finish(batch, [update] * len(batch), now)
    return now


def asked(tested: Scheduler, now: float, worker: int = 0) -> tuple[Batch | None, bool]:
    """The next step, and whether the policy was asked for it."""
    before = tested.asked.decisions
    batch = tested.next_batch("gpu", now, worker)
    return batch, tested.asked.decisions > before
