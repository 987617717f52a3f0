"""Policies that do what a good one would not, by the names that settings call them by."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.core.policy import Decision


@dataclass(frozen=True)
class Wrong:
    """Chooses a job twice."""

    def decide(self, view):
        job = view.jobs[0]
        return Decision([job, job])


@dataclass(frozen=True)
class Broken:
    """Raises what is no error of the library."""

    def decide(self, view):
        return view.jobs[0].params["no such parameter"]


@dataclass(frozen=True)
class Patient:
    """Waits two milliseconds before each step."""

    def decide(self, view):
        if int(view.now / 0.002) % 2:
            return Decision(wake_at=view.now + 0.002)
        return Decision(view.jobs[:1])


@dataclass(frozen=True)
class One:
    """Runs one job a step, whoever had to wait the longest."""

    def decide(self, view):
        return Decision([max(view.jobs, key=lambda job: (job.skipped, -job.arrival))])


@dataclass(frozen=True)
class Moody:
    """Errs at a third of its decisions."""

    def decide(self, view):
        jobs = view.jobs
        return Decision(jobs[:1] * 2 if int(sum(job.call_outputs + job.computed for job in jobs)) % 3 == 1 else jobs)
