"""Requests for images on one worker under `priced`, for its tests."""

from __future__ import annotations

import math

import hand
from hand import Hand
from toys import engine

from neustream import (
    SLO,
    Graph,
    LinearProfile,
    Pool,
    Priced,
    Request,
    Scheduler,
    Stage,
    TableProfile,
    loop,
    seq,
)
from neustream.core.events import Ended

TEXT, UNET, VAE = Stage("text", max_batch=2), Stage("unet", max_batch=4), Stage("vae", max_batch=2, emits=True)
REFINE = Stage("refine", max_batch=4)
READ = Stage("read", max_batch=4, emits=True, size=lambda job: job.params["steps"])


def steps_of(job):
    return job.params["steps"]


LOOP = Graph("loop", loop(UNET, times=steps_of))
IMAGE = Graph("image", seq(TEXT, loop(UNET, times=steps_of), VAE))
SHORT = Graph("short", seq(TEXT, VAE))
OTHER = Graph("other", loop(REFINE, times=steps_of))
BOTH = Graph("both", seq(loop(UNET, times=steps_of), loop(REFINE, times=2), VAE))
TURNS = Graph("turns", seq(TEXT, loop(seq(UNET, REFINE), times=steps_of), VAE))
SIZED = Graph("sized", seq(READ, loop(UNET, times=steps_of)))
EVERY = Graph("every", seq(TEXT, UNET, VAE, REFINE, READ))
# In turns one step of each costs 1, 1.25, 1.5, then 0.5 for each: batches of three are the most efficient.
PROFILES = {
    "text": LinearProfile("text", base=0.5, max_batch=2),
    "unet": TableProfile("unet", [1, 2, 3, 4], [1.0, 1.25, 1.5, 4.0]),
    "refine": LinearProfile("refine", base=1.0, max_batch=4),
    "vae": TableProfile("vae", [1, 2], [0.25, 0.375]),
    "read": LinearProfile("read", base=0.5, per_size=0.125, max_batch=4),
}


def ask(id, steps=4, due=math.inf, arrival=0.0, graph=LOOP, **slo):
    return Request(id, graph, arrival, SLO(due - arrival, **slo), {"steps": steps})


def waiting(*requests, workers=1, profiles=PROFILES):
    some = Scheduler([Pool("gpu", tuple(profiles), workers)], Hand(), profiles)
    for request in requests:
        some.submit(request, request.arrival)
    return some


def run(some, *names, now=0.0, worker=0, end=True):
    """One step of the named jobs, which takes as long as its profile says; returns when it ends."""
    batch = hand.begin(some, *names, now=now, worker=worker)
    if end:
        some.finish(batch, [{}] * len(batch), now + batch.expected)
    return now + batch.expected


def chosen(some, now=0.0, worker=0, policy=None):
    return hand.chosen(policy or Priced(), some, now, worker)


def dropped(some, now=0.0):
    return hand.dropped(Priced(), some, now)


def outcomes(*requests, policy=None, graph=EVERY, profiles=PROFILES):
    """id -> whether it was on time, after a run on one worker that serves the stages of `graph`."""
    on_time = {}

    def see(record):
        if isinstance(record, Ended):
            on_time[record.id] = record.on_time

    engine(graph, profiles, policy or Priced(), observers=[see]).run(requests)
    assert set(on_time) == {request.id for request in requests}
    return on_time
