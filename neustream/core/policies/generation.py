"""Mechanics of LLM steps that several policies share: who decodes, who prefills, what a step takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neustream.core.policy import Decision, View
from neustream.core.steps import Part, Step, StepLatency
from neustream.core.types import Job

Key = Callable[[Job], float]


@dataclass(slots=True)
class Generation:
    """The jobs of a pool that are at the stages of one language model.

    `decodes` in the order they came to decoding, `prefills` in the order they came, those whose memory
    was taken or whose prefill has begun first. `seats`: the most requests in one step.
    """

    view: View
    steps: StepLatency
    label: str
    decodes: list[Job]
    prefills: list[Job]
    seats: int
    speed: float

    def seconds(self, step: Step) -> float:
        """Expected seconds of a step."""
        return self.speed * self.steps.seconds(step)

    def room(self) -> int:
        """Blocks of memory that are free; a great many where there is no limit."""
        return self.view.free if self.view.pool.memory is not None else 2**60

    def blocks(self, job: Job, tokens: float) -> int:
        """Blocks that `job` needs beyond those that it holds to keep `tokens` more of its step."""
        memory = self.view.pool.memory
        if memory is None:
            return 0
        assert job.stage is not None
        return memory.blocks_of(job.size if job.stage.reads else job.progress + tokens) - job.held


def begun(job: Job) -> bool:
    """Whether some of its prompt, or of what it generated, was computed already."""
    return job.progress > 0 or job.run > 0


def generation(view: View) -> Generation | None:
    """What is there of a language model; None if the pool serves none, or none of its jobs is there.

    A pool that serves several gets the one whose job came to its stage first.
    """
    models: dict[str, list[Job]] = {}
    for queue in view.queues.values():
        stage = queue[0].stage
        if stage is not None and stage.fuse and stage.keeps:
            models.setdefault(stage.fuse, []).extend(queue)
    if not models:
        return None
    label = min(models, key=lambda name: min(job.joined_at for job in models[name])) if len(models) > 1 else min(models)
    decodes = [job for job in models[label] if job.stage is not None and job.stage.reads]
    prefills = [job for job in models[label] if job.stage is not None and not job.stage.reads]
    prefills.sort(key=lambda job: not begun(job))
    first = models[label][0].stage
    assert first is not None
    profile = view.profiles[first.name]
    if not isinstance(profile, Part):
        return None
    speed = max(view.speed.get(name, 1.0) for name in view.queues)
    return Generation(view, profile.steps, label, decodes, prefills, first.max_batch, speed)


def continuous(
    view: View,
    model: Generation,
    key: Key,
    budget: int,
    drop: Sequence[Job] = (),
) -> tuple[list[Job], dict[Job, float]]:
    """One step of continuous batching with chunked prefill, as vLLM's default scheduler makes it.

    All decodes run. Prompts are prefilled in parts of what is left of `budget` tokens, those that have
    begun first, then the others by `key`, as long as there are seats and memory for the next one; it
    waits, and those behind it, if there are not. Returns who runs, by `key`, and the prompts' parts.
    """
    gone = set(drop)
    jobs = sorted((job for job in model.decodes if job not in gone), key=key)
    sizes: dict[Job, float] = {}
    tokens = budget - len(jobs)
    free = model.room() - sum(model.blocks(job, 1) for job in jobs)
    seats = model.seats - len(jobs)
    for job in sorted((job for job in model.prefills if job not in gone), key=lambda job: (not begun(job), key(job))):
        size = min(job.size, tokens)
        need = model.blocks(job, size)
        if size < 1 or seats < 1 or need > free:
            break
        jobs.append(job)
        sizes[job] = size
        tokens -= int(size)
        free -= need
        seats -= 1
    return jobs, sizes


def decision(view: View, model: Generation, key: Key, budget: int, drop_hopeless: bool) -> Decision:
    """`continuous` as a decision, with or without giving up who cannot be in time any more."""
    drop = view.hopeless() if drop_hopeless else {}
    jobs, sizes = continuous(view, model, key, budget, list(drop))
    return Decision(jobs, drop, sizes=sizes)
