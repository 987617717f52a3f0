"""Requests for images that wait on one worker, moved by hand, for tests of policies."""

from __future__ import annotations

import math

from hand import Hand, begin, ids

from neustream import (
    SLO,
    Graph,
    LinearProfile,
    Pool,
    Request,
    Scheduler,
    Stage,
    TableProfile,
    loop,
    seq,
)

TEXT, UNET, VAE = Stage("text", max_batch=8), Stage("unet", max_batch=4), Stage("vae", max_batch=2, emits=True)


def steps_of(job):
    return job.params["steps"]


IMAGE = Graph("image", seq(TEXT, loop(UNET, times=steps_of), VAE))
LOOP = Graph("loop", loop(UNET, times=steps_of))
PREVIEW = Graph("preview", seq(VAE, loop(UNET, times=steps_of)))  # its only output comes first
REFINE = Stage("refine", max_batch=4)
TWO_LOOPS = Graph("two loops", seq(loop(UNET, times=steps_of), loop(REFINE, times=2)))
PROFILES = {
    "text": LinearProfile("text", base=0.5, max_batch=8),
    "unet": TableProfile("unet", [1, 2, 3, 4], [1.0, 1.25, 1.5, 4.0]),
    "refine": LinearProfile("refine", base=1.0, max_batch=4),
    "vae": LinearProfile("vae", base=0.25, max_batch=2),
}
FAR = math.inf


def ask(id, steps=4, arrival=0.0, total=FAR, graph=IMAGE, **slo):
    return Request(id, graph, arrival, SLO(total=total, **slo), {"steps": steps})


def waiting(*requests, workers=1, policy=None):
    """A scheduler with these requests waiting; tests move them with `run`."""
    some = Scheduler([Pool("gpu", tuple(PROFILES), workers)], policy or Hand(), PROFILES)
    for request in requests:
        some.submit(request, request.arrival)
    return some


def run(some, *names, now=0.0, worker=0, end=True):
    """One step of the named jobs on `worker`."""
    batch = begin(some, *names, now=now, worker=worker)
    if end:
        some.finish(batch, [{}] * len(batch), now)
    return batch


def steps_run(policy, *requests):
    """All steps of a run with one worker, one after the other: (stage, ids)."""
    some, now, steps = waiting(*requests, policy=policy), 0.0, []
    while batch := some.next_batch("gpu", now):
        now += batch.expected
        some.finish(batch, [{}] * len(batch), now)
        steps.append((batch.stage, ids(batch.jobs)))
    assert not some.jobs
    return steps


def units(*steps_and_totals, workers=1):
    """Requests of one looped stage: 1, 1.25, 1.5 or 4 s a step in batches of 1 to 4."""
    requests = [ask(f"r{i}", steps, total=total, graph=LOOP) for i, (steps, total) in enumerate(steps_and_totals)]
    return waiting(*requests, workers=workers)
