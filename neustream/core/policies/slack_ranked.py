"""Preemption at step boundaries by slack, batches sized by deadlines."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from neustream.core.job import Job
from neustream.core.policies.batching import largest_in_time
from neustream.core.policy import Decision, View


@dataclass(frozen=True)
class SlackRanked:
    """The least slack first, in the largest batch that keeps its members' deadlines; the slack pays
    for preemption.

    Sources: GenServe (arXiv 2604.04335) preempts videos at step boundaries, the one with the most
    slack first, and TetriServe (arXiv 2510.01565) packs the steps of a round so that the fewest
    requests are late. This is what of their rules is left on one device:

    * Requests are ranked by slack: time to the due moment minus the work left, run alone.
    * A batch of b runs if b requests are still in time when each of their steps left takes l(b);
      the largest such b is taken, filled in order of rank. Who would not be in time there waits.
    * A running request loses its seat to a waiting one of less slack only if its own slack covers
      being skipped: with all of its steps at l(b), it is in time even after one step without it. A
      b that would make a running request late which cannot be skipped is not taken.
    * Requests that would be late even alone are given up, or, without `drop_hopeless`, run when
      nobody else waits.

    Differences from those sources: they choose degrees of sequence parallelism over several GPUs,
    GenServe by a dynamic program over all requests, TetriServe in rounds of fixed length; here is
    one device, one decision a step, and a greedy choice. Predicting every step of a request at the
    size of the next one, and the protection of running requests, are this port's own. "Running"
    means in the latest step of its stage, so in a pool of several workers a request is protected
    less.
    """

    drop_hopeless: bool = True

    def decide(self, view: View) -> Decision:
        def slack(job: Job) -> float:
            return job.slack(view.now)

        hopeless = view.hopeless()
        drop = hopeless if self.drop_hopeless else {}
        stage = view.first_stage(slack, without=hopeless)
        if stage is not None:
            jobs = [job for job in view.queues[stage] if job not in hopeless]
            jobs.sort(key=slack)
            running = [job for job in jobs if job.ran_last]
            return Decision(largest_in_time(view, stage, jobs, running), drop)
        stage = view.first_stage(attrgetter("arrival"), without=drop)
        if stage is None:
            return Decision(drop=drop)
        return Decision(sorted(view.queues[stage], key=attrgetter("arrival"))[: view.limit(stage)])
