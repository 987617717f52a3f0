"""Requests on their way that run in one pool together, and the chance of each to be in time.

How long generations get is not known, neither here nor further on. Here it is a chance at each step
(`core/lengths.py`); what is behind counts by four numbers that are as likely (`SHARES`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.lengths import Lengths
from neustream.core.many_decodes import decode_seconds
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.policies.way_ahead import SHARES, to_come
from neustream.core.policies.way_rooms import Ahead
from neustream.core.types import TICK

Floats = NDArray[np.float64]
OTHERS = 0.5
"""Share of the time that a request has to spare which others may take further on."""


class Row(NamedTuple):
    """A request of a pool.

    Args:
        left: outputs to come, at each of `SHARES`; most: of these at most.
        made: outputs of its call so far; context: tokens that it reads.
        here: seconds alone that it has ahead here.
        hard: seconds within which it has to be done here, at each of the `SHARES` of what is
            behind; shared: of that, seconds alone in pools that charge for it.
    """

    job: Job
    left: Sequence[float]
    most: float
    made: float
    context: float
    here: float
    hard: Sequence[float]
    shared: Sequence[float]

    @property
    def known(self) -> bool:
        """Whether it is known how long its generations get, here and further on."""
        return min(self.left) == self.most and max(self.hard) - min(self.hard) < TICK

    @property
    def spare(self) -> float:
        """Seconds for it here, of an even share, beside those that it takes alone."""
        even = [
            within - max(within - self.here, 0.0) * others / max(others + self.here, TICK)
            for within, others in zip(self.hard, self.shared, strict=True)
        ]
        return sum(even) / len(even) - self.here

    def behind(self, at: float) -> float:
        """Seconds by which it is behind an even way, if its next output comes at some instant.

        On that each part of its way takes as many times what it takes alone.
        """
        job = self.job
        stretch = (job.due - job.arrival) / max(job.alone_s, TICK)
        return at - job.due + stretch * (job.remaining_s - job.unit_s)


def row_of(model: ModelQueues, job: Job, ahead: Ahead) -> Row:
    """What is known of a request with so much ahead of it."""
    legs = ahead.legs
    most = float(max(job.calls_here(f"{model.label}.decode"), 1))
    left = to_come(model.view.lengths.get(model.label), job.call_outputs, most)
    here = sum(left) / len(left) * (legs[0].base + legs[0].each) if legs else 0.0
    time = job.due - model.view.now
    hard = [time - seconds for seconds in ahead.behind]
    context = job.size + job.computed
    return Row(job, left, most, job.call_outputs, context, here, hard, ahead.shared)


class Run:
    """Requests of a pool that run together as they are.

    Args:
        ahead: seconds before the first decode of all of them.

    Attributes:
        weight: of each request.
        kept: tokens in memory at each point at which one may be over; nothing without requests.
    """

    def __init__(self, model: ModelQueues, rows: Sequence[Row] = (), ahead: float = 0.0) -> None:
        self.model, self.rows, self.ahead = model, list(rows), ahead
        if rows:
            self.left = np.array([row.left for row in rows])
            self.most = np.array([row.most for row in rows])
            self.made = np.array([row.made for row in rows])
            self.context = np.array([row.context for row in rows])
            self.weight = np.array([row.job.weight for row in rows])
            self._order()
            self._group()

    def _order(self) -> None:
        """The points at which one may be over, and what is in memory there.

        Of each request a part that is as likely ends at each of the numbers in `left`.
        """
        left = self.left.ravel()
        order = left.argsort(kind="stable")
        self._points = left[order]
        share = 1 / len(SHARES)
        self._count = share * np.arange(len(order), 0, -1, dtype=np.float64)
        context = (self.context * share).repeat(len(SHARES))[order]
        self._read = context[::-1].cumsum()[::-1]
        self.kept = self._read + self._count * self._points

    @cached_property
    def _peak(self) -> tuple[float, float]:
        """At which of the points these keep most, and how much that is."""
        at = int(self.kept.argmax())
        return float(self._points[at]), float(self.kept[at])

    def least_kept(self, row: Row) -> float:
        """Tokens that these and one more keep at least at once; some run."""
        point, kept = self._peak
        there = sum([left >= point for left in row.left]) / len(row.left)
        return kept + there * (row.context + point)

    @cached_property
    def _times(self) -> tuple[Floats, Floats, float]:
        """Decodes at each of the points, 0 in front; seconds until then; those of the last one."""
        steps, count = self._points, self._count
        before = np.concatenate([[0.0], steps[:-1]])
        read = self._read + count * (before + steps) / 2
        batch = np.maximum(np.rint(count), 1.0)
        each = self.model.speed * decode_seconds(self.model.steps, batch, np.maximum(read, 1.0))
        took = self.ahead + np.concatenate([[0.0], (each * (steps - before)).cumsum()])
        return np.concatenate([[0.0], steps]), took, float(each[-1])

    @cached_property
    def _longest(self) -> Floats:
        """Seconds until each has made all outputs that it may make [jobs]."""
        decodes, took, last = self._times
        beyond = np.maximum(self.most - decodes[-1], 0.0) * last
        longest: Floats = np.interp(self.most, decodes, took) + beyond + TICK
        return longest

    def chances(self, within: Floats) -> Floats:
        """Of each: that of ending in time, by how long generations get [jobs].

        `within`: seconds that there are, at each share of what is behind [jobs, shares].
        """
        if (within.min(axis=1) > self._longest).all():
            return np.ones(len(self.rows))
        decodes, took, last = self._times
        steps = np.interp(within, took, decodes, left=-1.0)
        steps += np.maximum(within - took[-1], 0.0) / last
        steps = np.floor(steps + TICK)
        lengths = self.model.view.lengths.get(self.model.label) or Lengths()
        most = float((self.made + self.most).max())
        all_of = self.most[:, None]
        late = lengths.lasts(self.made, np.minimum(np.maximum(steps, 0.0), all_of), most)
        late = np.where(steps >= all_of, 0.0, np.where(steps < 1, 1.0, late))
        # half of what `mean` takes
        chance: Floats = 1.0 - np.add.reduce(late, axis=1) / late.shape[1]
        return chance

    def has_memory(self, share: float) -> bool:
        """Whether all of these have a share of the memory to their ends."""
        alone = len(self.rows) == 1
        return alone or self._holds(float(self.kept.max()), len(self.rows), share)

    def may_take(self, job: Job, share: float) -> bool:
        """Whether these and one more have it until the first of them may end."""
        if not self.rows:
            return True
        count = len(self.rows) + 1
        read = job.size + job.computed + sum([row.context for row in self.rows])
        return self._holds(read + count, count, share)

    def may_keep(self, row: Row, share: float) -> bool:
        """The same when these keep most: what is said of all is told without making a run."""
        if not self.rows:
            return True
        return self._holds(self.least_kept(row) - TICK, len(self.rows) + 1, share)

    def _holds(self, tokens: float, jobs: int, share: float) -> bool:
        """Whether a share of the memory has so many tokens of some jobs; blocks end half full."""
        memory = self.model.memory
        if memory is None:
            return True
        return tokens + jobs * memory.block_size / 2 <= share * memory.capacity

    def without(self, rows: Collection[int]) -> Run:
        """The others than some."""
        left = [at for at in range(len(self.rows)) if at not in rows]
        fewer = Run(self.model, (), self.ahead)
        fewer.rows = [self.rows[at] for at in left]
        if left:
            fewer.left, fewer.most, fewer.made = self.left[left], self.most[left], self.made[left]
            fewer.context, fewer.weight = self.context[left], self.weight[left]
            fewer._order()
            fewer._group()
        return fewer

    def plus(self, row: Row, ahead: float) -> Run:
        """These and one more, the last; `ahead` as above."""
        if not self.rows:
            return Run(self.model, [row], ahead)
        more = Run(self.model, (), ahead)
        more.rows = [*self.rows, row]
        more.left = np.concatenate((self.left, (row.left,)))
        more.most = np.concatenate((self.most, (row.most,)))
        more.made = np.concatenate((self.made, (row.made,)))
        more.context = np.concatenate((self.context, (row.context,)))
        more.weight = np.concatenate((self.weight, (row.job.weight,)))
        more._order()
        more._group()
        return more

    def _group(self) -> None:
        """Which rows are of one request."""
        self._of: NDArray[np.int64] | None = None
        if any(row.job.joins is not None for row in self.rows):
            places: dict[Job, int] = {}
            of = [places.setdefault(row.job.needed_by, len(places)) for row in self.rows]
            self._of = np.array(of)

    def worths(self, chances: Floats) -> Floats:
        """Weight in time of each request, by the `chances` of its rows [jobs]: [requests].

        Branches that are worth nothing without each other are one: the least of them counts.
        """
        each = self.weight * chances
        if self._of is None:
            return each
        worths = np.full(int(self._of.max()) + 1, np.inf)
        np.minimum.at(worths, self._of, each)
        return worths

    def rows_of(self, request: int) -> list[int]:
        """The rows of a request, by its place in `worths`."""
        if self._of is None:
            return [request]
        rows: list[int] = np.flatnonzero(self._of == request).tolist()
        return rows

    @cached_property
    def soft_worths(self) -> Floats:
        """`worths` as far as each should be done here [requests]."""
        return self.worths(self.chances(self.soft))

    @cached_property
    def even_worths(self) -> Floats:
        """The same by `even` [requests]."""
        return self.worths(self.chances(self.even))

    def gain(self, before: Floats, beside: Run, after: Floats) -> float:
        """Weight in time that one more brings: its own, less what it costs other requests.

        Args:
            before: the worths of these.
            beside: these and that one, the last.
            after: the chances of all of them [jobs].
        """
        change = beside.worths(after)[: len(before)] - before
        if beside._of is not None and beside._of[-1] < len(before):  # a branch of one of these
            change[beside._of[-1]] = 0.0
        return float(change.sum() + beside.weight[-1] * after[-1])

    @property
    def hard(self) -> Floats:
        """Seconds within which each has to be done here [jobs, shares]."""
        return np.array([row.hard for row in self.rows])

    @property
    def soft(self) -> Floats:
        """Seconds within which each should be done here, as others are there further on too."""
        hard = self.hard
        return hard - OTHERS * self._further_on(hard)

    @property
    def even(self) -> Floats:
        """Seconds for each if all that it has ahead gets the same share [jobs, shares]."""
        hard = self.hard
        return hard - self._further_on(hard)

    def _further_on(self, hard: Floats) -> Floats:
        """Of what each has to spare, the share of pools further on, by seconds alone."""
        here = np.array([row.here for row in self.rows])[:, None]
        others = np.array([row.shared for row in self.rows])
        share: Floats = np.maximum(hard - here, 0.0) * others / np.maximum(others + here, TICK)
        return share
