"""Language models and other stages on one device: a rule for each, and one account of promises.

Two rules that each plan with the whole device promise it twice. So each is told what the jobs that
the others have begun still need, and by when (`View.reserved`), and promises only what fits beside
that. Then some order keeps all promises, and this file finds it: the step that runs next is one
after which every other promise can still be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from neustream.core.job import Job
from neustream.core.policies.background import beside, step_seconds
from neustream.core.policies.device_for import not_for
from neustream.core.policies.edf import EDF
from neustream.core.policies.model_queues import at_decode, by_model, latest_start, out_of_time
from neustream.core.policies.promised import promised_steps, promised_tokens
from neustream.core.policies.way_ahead import applies, go_on
from neustream.core.policy import Decision, Policy, View
from neustream.core.reserved import NOTHING, Reserved
from neustream.core.types import TICK
from neustream.errors import ConfigError

_OTHERS = "the device is not enough for all models, and others bring more in time"


def check_background(name: str, background: float) -> None:
    """ConfigError for a share that is none."""
    if not 0 <= background < 1:
        raise ConfigError(f"{name}: background must be 0 or more and below 1, got {background}")


@dataclass(frozen=True)
class PerModel:
    """A rule for each kind of jobs in a pool.

    Before each step, where jobs of several kinds wait (each language model is a kind of its own):

    1. What each kind's started jobs still need is drawn up as a curve over time (`promised.py`).
       Its *room* is the time for which the device can be kept from them.
    2. The kinds are asked for a step, and told the others' curves. Those in a hurry come first:
       they have little room, or a job that can only be promised if it starts soon.
    3. Of the steps that are not longer than the others' room, the one in the greatest hurry runs.
    4. If there is no such step, promises were made that cannot be kept (steps took longer, texts
       got longer than expected). Then the kind with the least room has its step.

    Where jobs of one kind wait, its rule decides as if alone.

    Requests that go through several kinds here, as agents that call two models of one device, and
    are promised nothing but their end (`whole_way.py`) have no promise at any one kind: what they
    need of one would be kept from themselves at the next. There the kinds are asked in the order of
    their most urgent job. The first step that costs nobody else the time to end runs; if there is
    none, that which costs the least weight. Stages that are of no language model,
    as encoders, run in order of deadline: who is left out of a batch to be in time here makes
    batches smaller further on, which costs all.

    Args:
        llm: for the steps of a language model; it is shown one at a time.
        rest: for all other stages.
        background: share of the device's time that jobs without a promise get at least while some
            of them wait (`background.py`).
        chooses: whether the device is for some language models alone where much is lost because it
            is not enough for all (`device_for.py`). Requests to the others then wait until there is
            no hope for them; those of them that have begun are given up as soon as somebody waits
            whom the device is for.
    """

    llm: Policy
    rest: Policy
    background: float = 0.05
    chooses: bool = False

    def __post_init__(self) -> None:
        check_background("per_model", self.background)

    def decide(self, view: View) -> Decision:
        return beside(view, self.background, self._promised)

    def _promised(self, view: View) -> Decision:
        kinds = by_model(view)
        out = not_for(view, kinds) & kinds.keys() if self.chooses else frozenset()
        if out and not applies(view):
            return self._without(view, kinds, out)
        return self._of_all(view, kinds)

    def _without(self, view: View, kinds: Mapping[str, View], out: Set[str]) -> Decision:
        """What is decided where the device is not for some language models."""
        served = [job for label, part in kinds.items() if label not in out for job in part.jobs]
        others_wait = not all(job.begun for job in served)
        drop: dict[Job, str] = {}
        aside: set[Job] = set()
        for label in out:
            late = kinds[label].hopeless()
            for job in kinds[label].jobs:
                if not job.begun:
                    aside.add(job)
                    if job in late:
                        drop[job] = f"{late[job]}; {_OTHERS}"
                elif others_wait:
                    aside.add(job)
                    drop[job] = f"shed: {_OTHERS}"
        left = _left(view, aside)
        made = Decision() if left is None else self._of_all(left, by_model(left))
        drop |= made.drop
        if made.jobs:
            return replace(made, drop=drop, until=-math.inf)
        waits = [out_of_time(view, job) for job in aside if job not in drop]
        if made.wake_at is not None:
            waits.append(made.wake_at)
        return Decision(drop=drop, wake_at=min(waits, default=None))

    def _of_all(self, view: View, kinds: Mapping[str, View]) -> Decision:
        label = next(iter(kinds), "")
        if label and len(kinds) == 1:
            return self.llm.decide(view)
        if applies(view) and go_on(view):
            return self._through_kinds(view, kinds)
        if len(kinds) == 1:
            return self.rest.decide(view)
        return _Joint(self.rule, kinds).decision()

    def _through_kinds(self, view: View, kinds: Mapping[str, View]) -> Decision:
        """The step of the kind with the most urgent job, unless another one costs others less."""
        urgency = {label: min(map(latest_start, part.jobs)) for label, part in kinds.items()}
        drop: dict[Job, str] = {}
        wakes: list[float] = []
        best = Decision()
        least = math.inf
        for label in sorted(kinds, key=urgency.__getitem__):
            made = self._on_the_way(label, kinds[label])
            drop |= made.drop
            if not made.jobs:
                wakes += [] if made.wake_at is None else [made.wake_at]
                continue
            lost = _lost(view, step_seconds(kinds[label], made), made.jobs, drop)
            if lost < least:
                best, least = made, lost
            if not least:
                break
        if best.jobs:
            return replace(best, drop=drop, until=-math.inf)
        return Decision(drop=drop, wake_at=min(wakes, default=None))

    def _on_the_way(self, label: str, view: View) -> Decision:
        """What the rule of a kind decides for requests that go on to other kinds here."""
        return (self.llm if label else EDF()).decide(view)

    def rule(self, label: str) -> Policy:
        """The rule for a language model, by its name, or for all other stages."""
        return self.llm if label else self.rest


def _left(view: View, without: Set[Job]) -> View | None:
    """The view without some jobs; None if there are no others."""
    queues = {}
    for name, queue in view.queues.items():
        some = [job for job in queue if job not in without]
        if some:
            queues[name] = some
    return replace(view, queues=queues) if queues else None


def _lost(view: View, seconds: float, jobs: Sequence[Job], drop: Mapping[Job, str]) -> float:
    """The weight of those that have no time to end after a step of some jobs.

    Who has none before it has none after any step, and makes no difference between them.
    """
    now, there = view.now, set(jobs)
    lost = 0.0
    for job in view.jobs:
        if job in drop:
            continue
        done = job.unit_s if job in there else 0.0
        left = job.due - now + done - seconds + TICK
        if left < job.remaining_s and left < view.least_s(job):
            lost += job.weight
    return lost


@dataclass(slots=True)
class _Joint:
    """One decision for jobs of several kinds.

    Attributes:
        kinds: their views, by model; needs: what each has been promised; others: what all
            others of each have.
        steps: those that were proposed, and would break another kind's promise.
    """

    rule: Callable[[str], Policy]
    kinds: Mapping[str, View]
    needs: dict[str, Reserved] = field(init=False)
    others: dict[str, Reserved] = field(default_factory=dict)
    steps: dict[str, Decision] = field(default_factory=dict)
    drop: dict[Job, str] = field(default_factory=dict)
    wakes: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.needs = {
            label: promised_tokens(view) if label else promised_steps(view)
            for label, view in self.kinds.items()
        }
        for label in self.kinds:
            needs = [need for other, need in self.needs.items() if other != label]
            self.others[label] = sum(needs, NOTHING)

    def decision(self) -> Decision:
        """The step that runs next."""
        hurry = {label: self._hurry(label, self.kinds[label].jobs) for label in self.kinds}
        order = sorted(self.kinds, key=hurry.__getitem__)
        best: Decision | None = None
        least = (math.inf, math.inf)
        for label in order:
            if best is not None and hurry[label] >= least:
                break  # its step cannot be in more of a hurry than its jobs are
            made = self._ask(label, self.others[label])
            if not made.jobs:
                continue
            if not self._costs_nobody(label, made):
                self.steps[label] = made
                continue
            key = self._hurry_of(label, made)
            if best is None or key < least:
                best = made
                least = key
        made = best or self._for_want_of_better(order)
        return replace(made, drop=self.drop, until=-math.inf)

    def _for_want_of_better(self, order: Sequence[str]) -> Decision:
        """Each step that was proposed costs somebody's promise, or there is none."""
        if self.steps:
            return self.steps[min(self.steps, key=lambda label: self.needs[label].room)]
        if self.wakes:
            return Decision(wake_at=min(self.wakes))
        made = Decision()
        for label in order:  # nobody dares, beside promises that nobody keeps
            made = self._ask(label, NOTHING)
            if made.jobs:
                break
        return made

    def _hurry(self, label: str, jobs: Iterable[Job]) -> tuple[float, float]:
        """Seconds until a kind must have the device: for what it promised, or to promise more.

        And when the first of the jobs that are in such a hurry came.
        """
        now = self.kinds[label].now
        least = (self.needs[label].room, -math.inf)
        for job in jobs:
            if job.started_at is None and not job.late:
                least = min(least, (self._time_to_start(job, label, now), job.joined_at))
        return least

    def _hurry_of(self, label: str, made: Decision) -> tuple[float, float]:
        """That of a step.

        Decodes that were promised nothing more hold the memory, and the time to come, that keep
        prompts of their model out: their steps are in as much of a hurry as those are. Else they
        would stand as long as others have work.
        """
        hurry = self._hurry(label, made.jobs)
        if hurry[0] == math.inf and all(map(at_decode, made.jobs)):
            return self._hurry(label, self.kinds[label].jobs)
        return hurry

    def _time_to_start(self, job: Job, label: str, now: float) -> float:
        """Seconds for which a job may wait if it then has what others leave of the device."""
        left = self.others[label].left
        return min(
            left(job.due - now) - job.remaining_s, left(job.due_next - now) - job.next_output_s
        )

    def _ask(self, label: str, reserved: Reserved) -> Decision:
        """What the rule of a kind decides beside what is reserved for others."""
        made = self.rule(label).decide(replace(self.kinds[label], reserved=reserved))
        self.drop |= made.drop
        if not made.jobs and made.wake_at is not None:
            self.wakes.append(made.wake_at)
        return made

    def _costs_nobody(self, label: str, made: Decision) -> bool:
        """Whether all others can keep their promises after a step."""
        room = min([need.room for other, need in self.needs.items() if other != label])
        return room == math.inf or step_seconds(self.kinds[label], made) <= room + TICK
