"""What a step takes: profiles, their corrections, learnt steps, and how much real steps spread.

This is the only place that knows profiles and what was observed of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeVar

from neustream.core.batch import Batch
from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.observed import Correction, Ratios
from neustream.core.profile import LatencyProfile
from neustream.core.steps import PhaseProfile, Step, StepLatency
from neustream.errors import ProfileError

Value = TypeVar("Value")


class Expected(NamedTuple):
    """Seconds of a step: by what was learnt, and by the profile as it was given.

    `step`: what a language model computes in it.
    """

    seconds: float
    profiled: float
    step: Step | None = None


def step_of(jobs: Sequence[Job], sizes: Sequence[float]) -> Step:
    """What jobs at the stages of one language model compute in a step of these sizes."""
    prefills = decodes = 0
    tokens = square = context = 0.0
    for job, size in zip(jobs, sizes, strict=True):
        assert job.stage is not None
        if job.stage.phase == "decode":
            decodes += 1
            context += size
        else:
            prefills += 1
            tokens += size
            square += (2 * job.computed + size) * size
    return Step(prefills, tokens, square, decodes, context)


def step_latency(
    profiles: Mapping[str, LatencyProfile], jobs: Sequence[Job], sizes: Sequence[float]
) -> float:
    """Profiled seconds of one step.

    Stages of one model have a step profile in common (`PhaseProfile.steps`); where they have none,
    a step that they share counts as the sum of their parts.
    """
    first = jobs[0].stage
    assert first is not None
    profile = profiles[first.name]
    if first.size is None and not first.model:
        return profile.latency(len(jobs))
    if isinstance(profile, PhaseProfile):
        return profile.steps.seconds(step_of(jobs, sizes))
    parts: dict[str, list[float]] = {}
    for job, size in zip(jobs, sizes, strict=True):
        assert job.stage is not None
        parts.setdefault(job.stage.name, []).append(size)
    return sum(
        profiles[name].latency(len(part), sum(part), sum(x * x for x in part))
        for name, part in parts.items()
    )


def latency_of(profiles: Mapping[str, LatencyProfile], batch: Batch) -> float:
    """The same of a step that is made."""
    first = batch.jobs[0].stage
    if batch.step is not None and first is not None:
        profile = profiles[first.name]
        if isinstance(profile, PhaseProfile):
            return profile.steps.seconds(batch.step)
    return step_latency(profiles, batch.jobs, batch.sizes)


def _without(known: Mapping[str, Value], stages: Collection[str]) -> dict[str, Value]:
    return {name: value for name, value in known.items() if name not in stages}


def _stages_of(batch: Batch) -> list[str]:
    """The stages that take part in a step."""
    first = batch.jobs[0].stage
    if first is not None and not first.model:  # nobody else's step
        return [first.name]
    return list({job.stage.name for job in batch.jobs if job.stage is not None})


class StepTimes:
    """Expects what steps take, and learns from those that ran.

    Args:
        profiles: by stage.
        correct: whether steps that keep taking other times than their profile says correct it.

    `profiles` holds the corrected ones. It and `speed` (observed over expected seconds lately, by
    stage) are replaced, never changed: views hold the ones before. `spread`: the latest ratios of
    observed to expected seconds, by stage. `version` grows with each change of `profiles`.
    """

    def __init__(self, profiles: Mapping[str, LatencyProfile], *, correct: bool = False) -> None:
        self.profiles: Mapping[str, LatencyProfile] = dict(profiles)
        self.version = 0
        self.speed: Mapping[str, float] = {}
        self.spread: dict[str, Ratios] = {}
        self._corrections: dict[str, Correction] | None = {} if correct else None
        self._alone: dict[str, float] = {}
        self._given: dict[
            str, LatencyProfile
        ] = {}  # before they were corrected, of those that were

    def add(self, profiles: Mapping[str, LatencyProfile]) -> None:
        """More stages."""
        self.profiles = {**self.profiles, **profiles}
        self.version += 1

    def remove(self, stages: Collection[str]) -> None:
        """Forget stages."""
        self.profiles = _without(self.profiles, stages)
        self.version += 1
        self.speed = _without(self.speed, stages)
        tables: list[MutableMapping[str, Any]] = [self.spread, self._alone, self._given]
        if self._corrections is not None:
            tables.append(self._corrections)
        for table in tables:
            for stage in stages:
                table.pop(stage, None)

    @property
    def corrections(self) -> dict[str, dict[int, float]]:
        """Observed over profiled seconds of corrected stages, at batch sizes near 2**key."""
        known = self._corrections or {}
        return {name: dict(of.factors) for name, of in known.items() if of.factors}

    def limit(self, stage: Stage) -> int:
        """The most jobs in one step: what the stage allows and the profile covers."""
        return min(stage.max_batch, self.profiles[stage.name].max_batch)

    def alone(self, stage: Stage, size: float) -> float:
        """Seconds of one call of `stage` alone, for a step of `size`."""
        if stage.size is not None:
            return self.profiles[stage.name].latency(1, size, size * size)
        seconds = self._alone.get(stage.name)
        if seconds is None:
            if stage.name not in self.profiles:
                raise ProfileError(f"stage {stage.name!r} has no profile")
            seconds = self._alone[stage.name] = self.profiles[stage.name].latency(1)
        return seconds

    def expect(self, jobs: Sequence[Job], sizes: Sequence[float]) -> Expected:
        """Seconds that a step of `jobs` should take."""
        first = jobs[0].stage
        assert first is not None
        profile = self.profiles[first.name]
        if isinstance(profile, PhaseProfile):
            return self.of_step(profile.steps, step_of(jobs, sizes))
        seconds = step_latency(self.profiles, jobs, sizes)
        if not self._given:
            return Expected(seconds, seconds)
        return Expected(seconds, step_latency({**self.profiles, **self._given}, jobs, sizes))

    def of_step(self, steps: StepLatency, step: Step) -> Expected:
        """The same of a step of a language model."""
        seconds = steps.seconds(step)
        profiled = steps.profiled(step) if steps.learns else seconds
        return Expected(seconds, profiled, step)

    def as_fast_as(self, before: Mapping[str, float], slower: float) -> bool:
        """Whether steps take as long as by the `speed` of before; if `slower` is more than 1, or
        less than that, or up to so many times as long."""
        speed = self.speed
        if speed is before:
            return True
        pairs = ((speed.get(name, 1.0), before.get(name, 1.0)) for name in {*speed, *before})
        return all(now == then or (slower > 1 and now <= slower * then) for now, then in pairs)

    def over_at(self, batch: Batch) -> float:
        """When a step under way should be over, at the speed of its stage lately."""
        first = batch.jobs[0].stage
        speed = 1.0 if first is None else self.speed.get(first.name, 1.0)
        return batch.started_at + batch.expected * speed

    def observe(self, batch: Batch, seconds: float) -> str | None:
        """Take in a step that ran; the stage whose profile was corrected by it, if any."""
        if not batch.expected > 0:
            return None
        stages = _stages_of(batch)
        self.note(stages, seconds / batch.expected)
        profile = self.profiles[stages[0]]
        if isinstance(profile, PhaseProfile):
            if profile.steps.learns:  # what is learnt follows the device: no speed beside it
                step = batch.step or step_of(batch.jobs, batch.sizes)
                profile.steps.observe(step, seconds)
                return None
        elif len(stages) == 1 and self._corrected(batch.stage, batch, seconds):
            return batch.stage
        for name in stages:
            usual = self.spread[name].usual
            if self.speed.get(name) != usual:
                self.speed = {**self.speed, name: usual}
        return None

    def note(self, stages: Iterable[str], ratio: float) -> None:
        """A step of `stages` took `ratio` times what was expected."""
        for name in stages:
            ratios = self.spread.get(name)
            if ratios is None:
                ratios = self.spread[name] = Ratios()
            ratios.add(ratio)

    def _corrected(self, stage: str, batch: Batch, seconds: float) -> bool:
        """Compare a step with its stage's profile; whether a corrected one replaced that."""
        if self._corrections is None:
            return False
        known = self._corrections.get(stage)
        if known is None:
            known = self._corrections[stage] = Correction(self.profiles[stage])
        total = sum(batch.sizes)
        square = sum([size * size for size in batch.sizes]) if total else 0.0
        profile = known.observe(len(batch.jobs), total, square, seconds)
        if profile is None:
            return False
        before = self.profiles[stage]
        self._given.setdefault(stage, before)
        self.profiles = {**self.profiles, stage: profile}
        self.version += 1
        self._alone.pop(stage, None)
        if known.measured:
            size = len(batch), total, square
            self.spread[stage].rescale(before.latency(*size) / profile.latency(*size))
            self.speed = {**self.speed, stage: self.spread[stage].usual}
        else:
            self.spread[stage].reset_mean()
            self.speed = {name: speed for name, speed in self.speed.items() if name != stage}
        return True
