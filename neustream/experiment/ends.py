"""When the generations of a simulation end, which nobody but the simulation knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from neustream.core.batch import Batch
from neustream.core.job import Job


@dataclass(frozen=True)
class Ends:
    """Says which generations end with the output of a step. `lengths`: outputs of requests, by id."""

    lengths: Mapping[str, int]

    def __call__(self, batch: Batch) -> list[dict[str, bool]]:
        return [{"ended": True} if self._left(job) <= 1 else {} for job in batch.jobs]

    def quiet(self, batch: Batch) -> float:
        """In how many steps of the same jobs in a row, this one first, none ends."""
        return min([self._left(job) for job in batch.jobs]) - 1

    def _left(self, job: Job) -> float:
        """Outputs that its generation is to make yet; inf: it ends at its maximum, or is none."""
        end = self.lengths.get(job.id, job.params.get("ends"))  # a request of a pipeline has neither
        return math.inf if end is None else end - job.call_outputs
