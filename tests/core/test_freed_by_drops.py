"""Who is given up leaves its memory to those who wait, at once."""

from __future__ import annotations

from neustream import SLO, Decision, Graph, KVCache, LinearProfile, Pool, Request, Scheduler
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile("m", *[LinearProfile(name, base=1.0, max_batch=8) for name in ("prefill", "decode")])


class Careful:
    """Gives up who cannot be in time, and runs those for whom there are free blocks as it looks."""

    def decide(self, view):
        drop = view.hopeless()
        left = [job for job in view.jobs if job not in drop]
        return Decision([job for job in left if job.num_blocks or job.size <= 4 * view.free["m"]], drop)


def test_who_waits_for_the_memory_of_one_that_is_given_up_is_asked_about_again():
    graph = Graph("text", llm("m", max_batch=8))
    pool = Pool("gpu", tuple(graph.stages), kv_caches={"m": KVCache(4, 4)})
    scheduler = Scheduler([pool], Careful(), llm_profiles("m", STEPS, 8))
    scheduler.submit(Request("first", graph, 0.0, SLO(9.0), {"prompt_tokens": 10, "max_tokens": 4}), 0.0)
    scheduler.finish(scheduler.next_batch("gpu", 0.0), [{}], 1.0)
    scheduler.submit(Request("second", graph, 1.0, SLO(), {"prompt_tokens": 12, "max_tokens": 1}), 1.0)
    batch = scheduler.next_batch("gpu", 20.0)  # far too late for the first, which has the blocks
    assert [job.id for job in batch.jobs] == ["second"] and "first" not in scheduler.jobs
