"""Step-level continuous batching in order of slack."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.core.policies.batching import in_order
from neustream.core.policy import Decision, View


@dataclass(frozen=True)
class LeastLaxity:
    """Least laxity first (Dertouzos 1974, Mok 1983): the job that can idle the least runs first.

    The laxity of a job is its time to the due moment minus the work it has left, here its
    remaining steps run alone (`Job.slack`). The rule is optimal for one job at a time below
    capacity, as EDF is; unlike EDF it sees that a long request of a late deadline may be the more
    urgent one.

    Differences from that source: asked at every step boundary instead of at every instant, which
    spares it the endless swaps of jobs of equal laxity but not those of one step each; and a step
    runs the least lax of the stage together, up to its `max_batch`, without asking what the batch
    costs them. Under overload it favours whoever is about to be late, which `drop_hopeless` only
    softens.
    """

    drop_hopeless: bool = True

    def decide(self, view: View) -> Decision:
        return in_order(view, lambda job: job.slack(view.now), self.drop_hopeless)
