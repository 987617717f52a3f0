"""A policy's decision about vLLM's next step, checked, and told in vLLM's terms.

`ask` gives a `Choice`: ids and tokens. `arrange` turns it into what vLLM's queues hold during one
call of its `schedule`. Both are pure, and this file imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from neustream.core.decision import (
    check_apart,
    check_drops,
    check_progress,
    check_wake,
    named,
    step_label,
    step_sizes,
)
from neustream.core.job import Job
from neustream.core.policy import Decision, Policy, View
from neustream.errors import NeustreamError, PolicyError, told


@dataclass(frozen=True, slots=True)
class Choice:
    """Who runs in the next step, and who is given up.

    Args:
        tokens: what each request may compute, by id, in order of importance.
        partial: ids of those that compute only a part of their prompt.
        drop: reasons by id.
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    drop: Mapping[str, str] = field(default_factory=dict)


def ask(policy: Policy, view: View, *, in_flight: bool = False) -> Choice:
    """What `policy` decides of `view`; PolicyError if it raises, or decides what cannot be.

    While a step is in flight it may let all wait: what comes back with that step may change it.
    """
    if not view.queues:
        return Choice()
    try:
        return _checked(policy, policy.decide(view), view, in_flight)
    except NeustreamError:
        raise
    except Exception as error:
        raise PolicyError(f"{named(policy)} raised {told(error)}") from error


def _checked(policy: Policy, decision: Decision, view: View, in_flight: bool) -> Choice:
    """The decision as a choice; nothing of a decision with a fault is carried out."""
    live = {job.id: job for job in view.jobs}
    check_drops(policy, decision.drop, live)
    drop = {job.id: reason for job, reason in decision.drop.items()}
    jobs = tuple(decision.jobs)
    if jobs:
        label = step_label(policy, jobs, view, live)
        check_apart(policy, jobs, decision.drop)
        return _choice(jobs, step_sizes(policy, jobs, decision.sizes, label), drop)
    if decision.wake_at is not None:
        check_wake(policy, decision.wake_at, view.now)
    elif not in_flight:
        check_progress(policy, _without(view, decision.drop))
    return Choice(drop=drop)


def _choice(jobs: Sequence[Job], sizes: Sequence[float], drop: Mapping[str, str]) -> Choice:
    tokens: dict[str, int] = {}
    partial: set[str] = set()
    for job, size in zip(jobs, sizes, strict=True):
        if job.stage is not None and job.stage.phase == "decode":
            tokens[job.id] = 1
            continue
        tokens[job.id] = max(int(size), 1)
        if size < job.size:
            partial.add(job.id)
    return Choice(tokens, frozenset(partial), drop)


def _without(view: View, drop: Mapping[Job, str]) -> View:
    queues = {}
    for name, queue in view.queues.items():
        queues[name] = [job for job in queue if job not in drop]
    return replace(view, queues=queues)


class Queued(Protocol):
    """What is read of a request in vLLM's queues."""

    request_id: str
    num_computed_tokens: int


R = TypeVar("R", bound=Queued)


@dataclass(frozen=True, slots=True)
class Room:
    """What vLLM has left: seats among the running, KV blocks, and tokens of a step."""

    seats: int
    blocks: int
    block_size: int
    step_tokens: int

    def need(self, request: Queued, tokens: int) -> int:
        """Blocks that a request lacks for so many tokens more."""
        have = -(-request.num_computed_tokens // self.block_size)
        return -(-(request.num_computed_tokens + tokens) // self.block_size) - have


@dataclass(frozen=True, slots=True)
class Arrangement(Generic[R]):
    """vLLM's queues for one call of `schedule`.

    Args:
        running: the list of running requests, in order.
        apart: running requests that are in no queue during the call, and come back after it.
        waiting: the waiting requests that may begin.
        tokens: the most that the step computes.
        chosen: whether anybody is to run.
    """

    running: list[R]
    apart: list[R]
    waiting: list[R]
    tokens: int
    chosen: bool


def arrange(
    choice: Choice, running: Sequence[R], ready: Sequence[R], blocked: Sequence[R], room: Room
) -> Arrangement[R] | None:
    """The queues with which vLLM runs what was chosen; None if anyone may run.

    That is where no seat is free and none of the running ones was chosen: those that were cannot
    begin, and to wait for requests that may come is in vain.

    `ready` and `blocked` are the waiting ones: those that may be chosen, and those that vLLM has to
    look at before they can run (grammars). Who is not chosen is taken out of the queues. Where the
    chosen of `running` lack KV blocks, nobody begins, and who is not chosen stays behind them in
    the list: out of the reach of this step's tokens, and the first to be preempted.
    """
    going = _in_order(choice, running)
    apart = [request for request in running if request.request_id not in choice.tokens]
    if running and not going and room.seats <= 0:
        return None
    lack = 0
    going_tokens = 0
    for request in going:
        count = choice.tokens[request.request_id]
        going_tokens += count
        lack += room.need(request, count)
    if lack > room.blocks:
        return Arrangement(
            [*going, *apart], [], [], min(going_tokens, room.step_tokens), chosen=True
        )
    begin = [*_in_order(choice, ready), *blocked]
    # One more for those that vLLM has to look at: it does not while no token is left.
    tokens = sum(choice.tokens.values()) + bool(blocked)
    tokens = min(tokens, room.step_tokens)
    return Arrangement(going, apart, begin, tokens, chosen=bool(choice.tokens))


def _in_order(choice: Choice, requests: Sequence[R]) -> list[R]:
    """The chosen of `requests` by importance, but those that get only a part come last.

    vLLM would give the first of them all tokens that are left.
    """
    rank = {id: index for index, id in enumerate(choice.tokens)}
    chosen = [request for request in requests if request.request_id in rank]
    chosen.sort(key=lambda r: (r.request_id in choice.partial, rank[r.request_id]))
    return chosen


def put_back(before: Sequence[R], offered: Sequence[R], after: Sequence[R]) -> list[R]:
    """The waiting queue after a call of `schedule` that saw only `offered` of it.

    As it was `before`, less those that began; in front those that vLLM preempted meanwhile.
    """
    known, begun = set(before), set(offered).difference(after)
    preempted = [request for request in after if request not in known]
    return [*preempted, *[request for request in before if request not in begun]]
