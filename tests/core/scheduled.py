"""A scheduler of one pool with an image model and a language model, moved by hand, for its tests."""

from __future__ import annotations

from hand import Hand

from neustream import (
    FCFS,
    SLO,
    Decision,
    Graph,
    LinearProfile,
    Pool,
    Request,
    Scheduler,
    Stage,
    loop,
    seq,
)

TEXT, UNET, VAE = Stage("text", max_batch=4), Stage("unet", max_batch=4), Stage("vae", max_batch=2, emits=True)
IMAGE = Graph("image", seq(TEXT, loop(UNET, times=lambda job: job.params["steps"]), VAE))
PREFILL = Stage("prefill", max_batch=4, emits=True, size=lambda job: job.params["prompt"], model="llm")
DECODE = Stage("decode", max_batch=8, emits=True, size=lambda job: job.params["prompt"] + job.outputs, model="llm")
CHAT = Graph(
    "chat", seq(PREFILL, loop(DECODE, until=lambda job: job.state["eos"], expect=lambda job: job.params["about"] - 1))
)
PROFILES = {
    "text": LinearProfile("text", base=0.5, max_batch=4),
    "unet": LinearProfile("unet", base=0.75, per_job=0.25, max_batch=4),
    "vae": LinearProfile("vae", base=0.25, max_batch=4),
    "prefill": LinearProfile("prefill", base=1.0, per_size=0.125, per_square=0.03125, max_batch=4),
    "decode": LinearProfile("decode", base=0.25, max_batch=8),
}
PATIENT = FCFS(drop_hopeless=False)


def scheduler(policy=PATIENT, *, workers=1, sticky=False):
    return Scheduler([Pool("gpu", tuple(PROFILES), workers, sticky)], policy, PROFILES)


def image(id="r1", steps=2, slo=None, arrival=0.0):
    return Request(id, IMAGE, arrival, slo or SLO(), {"steps": steps})


def chat(id="r1", prompt=4, about=3, slo=None):
    return Request(id, CHAT, 0.0, slo or SLO(), {"prompt": prompt, "about": about})


def run(some, now, updates=None, worker=0, pool="gpu"):
    """One step from `now` on; returns its batch and when it ended."""
    batch = some.next_batch(pool, now, worker)
    some.finish(batch, [{}] * len(batch) if updates is None else updates, now + batch.expected)
    return batch, now + batch.expected


def choosing(*names):
    """A policy that runs the named jobs."""
    return Hand(lambda view: Decision([job for job in view.jobs if job.id in names]))
