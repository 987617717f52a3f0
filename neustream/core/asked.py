"""What policies were asked, by which the time of decisions is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from neustream.core.job import Job


class Asked(NamedTuple):
    """What policies were asked so far.

    decisions: how often a step was decided, those included that stand as decided before; requests:
    about how many a policy was asked, all together (about none where a step stands); new: how many
    of these had not run.
    """

    decisions: int = 0
    requests: int = 0
    new: int = 0

    def more(self, jobs: Sequence[Job] = ()) -> Asked:
        """After one more decision, about `jobs`."""
        new = sum([job.started_at is None for job in jobs])
        return Asked(self.decisions + 1, self.requests + len(jobs), self.new + new)

    def since(self, before: Asked) -> Asked:
        """What came after `before`."""
        decisions, requests, new = before
        return Asked(self.decisions - decisions, self.requests - requests, self.new - new)
