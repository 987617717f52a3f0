"""One request at a time."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.core.job import Job
from neustream.core.policy import Decision, View


@dataclass(frozen=True)
class Serial:
    """First come, first served, one request at a time, each run to its end.

    What a script around a stock pipeline does. `drop_hopeless` gives up requests that cannot be on
    time any more before they start; without it every request is served, however late.
    """

    drop_hopeless: bool = False

    def decide(self, view: View) -> Decision:
        jobs = [job for job in view.jobs if job.worker == view.worker]
        drop: dict[Job, str] = {}
        if not jobs:
            drop = view.hopeless() if self.drop_hopeless else {}
            jobs = [job for job in view.jobs if job.worker < 0 and job not in drop]
        if not jobs:
            return Decision(drop=drop)
        return Decision([min(jobs, key=lambda job: (job.arrival, job.joined_at))], drop)
