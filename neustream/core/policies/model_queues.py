"""Mechanics of LLM steps that policies share: who decodes, who prefills, what a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.observed import ENOUGH
from neustream.core.policy import Decision, View
from neustream.core.steps import PhaseProfile, Step, StepLatency
from neustream.core.types import TICK

Key = Callable[[Job], float]


@dataclass(slots=True)
class ModelQueues:
    """The jobs of a pool that are at the stages of one language model.

    `decodes` in the order they came to decoding, no more than there are seats (of more, which came
    from elsewhere, the most urgent); `prefills` in the order they came, those whose
    memory was taken or whose prefill has begun first. `seats`: the most requests in one step.
    `speed`: how many times their profile decodes take; `prompt_speed`: steps with prompts.
    """

    view: View
    steps: StepLatency
    label: str
    decodes: list[Job]
    prefills: list[Job]
    seats: int
    speed: float
    prompt_speed: float

    def seconds(self, step: Step) -> float:
        """Expected seconds of a step."""
        speed = self.prompt_speed if step.prefills else self.speed
        return speed * self.steps.seconds(step)

    @property
    def memory(self) -> KVCache | None:
        """Its KV cache, None where there is no limit."""
        return self.view.pool.kv_caches.get(self.label)

    def room(self) -> int:
        """Blocks of memory that are free; a great many where there is no limit."""
        return self.view.free.get(self.label, 2**60)

    def blocks(self, job: Job, tokens: float) -> int:
        """Blocks that `job` needs beyond those that it holds to keep `tokens` more of its step."""
        memory = self.memory
        if memory is None:
            return 0
        kept = job.size if at_decode(job) else job.computed + tokens
        return memory.blocks_of(kept) - job.num_blocks


def at_decode(job: Job) -> bool:
    """Whether it waits for its next decode."""
    return job.stage is not None and job.stage.phase == "decode"


def has_progress(job: Job) -> bool:
    """Whether some of its prompt, or of what it generated, was computed already."""
    return job.call_outputs > 0 or in_part(job)


def in_part(job: Job) -> bool:
    """Whether some of the prompt that it is at was computed, beyond what was known when it came."""
    if not job.computed or job.stage is None:
        return False
    return job.computed > job.stage.known_of(job)


def split_by_model(
    view: View, tokens: Callable[[View, ModelQueues], Decision], others: Callable[[View], Decision]
) -> Decision:
    """The decision of `tokens` for a language model's stages, of `others` for all other stages.

    Where a pool has jobs at both (or at several models'), the group with the most urgent job is
    asked first. The next one is asked only if that group runs nothing.
    """
    groups = by_model(view)
    if len(groups) == 1:
        return _one(view, next(iter(groups)), tokens, others)
    return in_turn(groups, lambda label: _one(groups[label], label, tokens, others))


def in_turn(groups: Mapping[str, View], decide: Callable[[str], Decision]) -> Decision:
    """The first step that one of several groups has, that with the most urgent job asked first."""
    urgency = {label: min(map(latest_start, part.jobs)) for label, part in groups.items()}
    drop: dict[Job, str] = {}
    wakes: list[float] = []
    for label in sorted(groups, key=urgency.__getitem__):
        made = decide(label)
        drop |= made.drop
        if made.jobs:
            return replace(made, drop=drop, until=-math.inf)
        if made.wake_at is not None:
            wakes.append(made.wake_at)
    return Decision(drop=drop, wake_at=min(wakes, default=None))


def by_model(view: View) -> dict[str, View]:
    """The view of each language model's jobs, and at "" that of all other stages' together."""
    groups: dict[str, dict[str, Sequence[Job]]] = {}
    for name, queue in view.queues.items():
        groups.setdefault(_model_of(view, name), {})[name] = queue
    if len(groups) == 1:
        return {next(iter(groups)): view}
    return {label: replace(view, queues=queues) for label, queues in groups.items()}


def one_model(view: View) -> ModelQueues:
    """The jobs of a view that is of one language model alone."""
    stage = next(iter(view.queues.values()))[0].stage
    assert stage is not None
    return _queues(view, stage.model)


def _model_of(view: View, stage: str) -> str:
    """The language model that the jobs of a stage are in a step of; "" for other stages."""
    declared = view.queues[stage][0].stage
    return "" if declared is None else kind_of(view, declared)


def kind_of(view: View, stage: Stage) -> str:
    """The language model in whose steps a stage runs; "" of all other stages."""
    return stage.model if isinstance(view.profiles[stage.name], PhaseProfile) else ""


def latest_start(job: Job) -> tuple[float, float]:
    """Latest time at which a job must run to stay on time; late and unpromised jobs sort last."""
    if job.late:
        return math.inf, job.joined_at
    start = min(job.due - job.remaining_s, job.due_next - job.next_output_s)
    return start, job.joined_at


def out_of_time(view: View, job: Job) -> float:
    """When a job that waits will have no hope any more."""
    due = min(job.due, job.due_next)
    latest = due - job.remaining_s + 2 * TICK
    return latest if latest > view.now else due + 2 * TICK


def _one(
    view: View,
    label: str,
    tokens: Callable[[View, ModelQueues], Decision],
    others: Callable[[View], Decision],
) -> Decision:
    if not label:
        return others(view)
    return tokens(view, _queues(view, label))


def model_queues(view: View, label: str) -> ModelQueues | None:
    """The jobs of a view that are at the stages of a language model; None without any."""
    queues = {}
    for name, queue in view.queues.items():
        stage = queue[0].stage
        if stage is not None and stage.model == label:
            queues[name] = queue
    return _queues(replace(view, queues=queues), label) if queues else None


def _queues(view: View, label: str) -> ModelQueues:
    decodes: list[Job] = []
    prefills: list[Job] = []
    for queue in view.queues.values():
        at = queue[0].stage  # that of all of them
        assert at is not None
        (decodes if at.phase == "decode" else prefills).extend(queue)
    if any(job.call_outputs or job.computed for job in prefills):  # of thousands hardly any
        prefills.sort(key=lambda job: not has_progress(job))
    stage = next(iter(view.queues.values()))[0].stage
    assert stage is not None
    profile = view.profiles[stage.name]
    assert isinstance(profile, PhaseProfile)
    seats = min(view.limit(name) for name in view.queues)
    if len(decodes) > seats:  # some were prefilled elsewhere
        urgent = set(sorted(decodes, key=_next_due)[:seats])
        decodes = [job for job in decodes if job in urgent]
    speeds = _speeds(view, stage.model)
    return ModelQueues(view, profile.steps, label, decodes, prefills, seats, *speeds)


def _speeds(view: View, label: str) -> tuple[float, float]:
    """The speeds of decodes and of steps with prompts; where too few were seen, the other's.

    Prompts come now and then: a block of their steps spans phases of the device, and its mean is
    that of no phase. Their median is; noise makes it less than the mean as it does for decodes.
    """
    stages = f"{label}.prefill", f"{label}.decode"
    prompts, decodes = map(view.speed.get, stages)
    rare, usual = map(view.spread.get, stages)
    if prompts and decodes and rare and usual:
        enough = rare.count >= ENOUGH
        prompts *= rare.typical / rare.usual * usual.usual / usual.typical
        prompts = prompts if enough else decodes
    return decodes or prompts or 1.0, prompts or decodes or 1.0


def _next_due(job: Job) -> tuple[bool, float, float]:
    """The most urgent first; who is late, or was promised nothing, in the order they came."""
    return job.late, job.due_next, job.joined_at


def continuous(
    view: View,
    model: ModelQueues,
    key: Key,
    budget: int,
    drop: Sequence[Job] = (),
) -> tuple[list[Job], dict[Job, float]]:
    """One step of continuous batching with chunked prefill, as vLLM's default scheduler makes it.

    All decodes run. Prompts are prefilled in parts of what is left of `budget` tokens, those that
    are under way first, then the others by `key`, as long as there are seats, and memory for all of
    the next one; it waits, and those behind it, if there are not. Returns who runs, by `key`, and
    the prompts' parts.
    """
    gone = set(drop)
    jobs = sorted(_without(model.decodes, gone), key=key)
    sizes: dict[Job, float] = {}
    tokens = budget - len(jobs)
    free = model.room() + sum([job.num_blocks for job in gone])
    free -= sum([model.blocks(job, 1) for job in jobs])
    seats = model.seats - len(jobs)
    prefills = _without(model.prefills, gone)
    for job in sorted(prefills, key=lambda job: (not in_part(job), key(job))):
        size = min(job.size, tokens)
        if size < 1 or seats < 1:
            break
        need = model.blocks(job, size)
        takes_from_others = not jobs and job.num_blocks > 0  # one under way that is alone
        if need > _room_for(model, job, free) and not takes_from_others:
            break
        jobs.append(job)
        sizes[job] = size
        tokens -= int(size)
        free -= need
        seats -= 1
    jobs.sort(key=key)  # who loses its memory is the last of all
    return jobs, sizes


def _without(jobs: Sequence[Job], gone: Collection[Job]) -> list[Job]:
    return [job for job in jobs if job not in gone]


def _room_for(model: ModelQueues, job: Job, free: int) -> int:
    """Blocks for a part of a prompt: none for the first part if there are not enough for all."""
    if not job.num_blocks and model.blocks(job, job.size) > free:
        return -1
    return free


def decision(
    view: View,
    model: ModelQueues,
    key: Key,
    budget: int,
    drop_hopeless: bool,
    *,
    lasts: bool = True,
) -> Decision:
    """`continuous` as a decision, with or without giving up who cannot be in time any more.

    A step of decodes alone stands if the order of their keys `lasts`: prompts that find no seat or
    memory now find none before somebody goes.
    """
    drop = view.hopeless() if drop_hopeless else {}
    jobs, sizes = continuous(view, model, key, budget, list(drop))
    until = math.inf if lasts and not sizes and not drop else -math.inf
    within = None if drop_hopeless else -math.inf
    return Decision(jobs, drop, sizes=sizes, until=until, within=within)
