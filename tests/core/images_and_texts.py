"""Images and texts for one pool, by hand, and what becomes of them."""

from __future__ import annotations

from collections import Counter

from hand import Hand

from neustream import (
    FCFS,
    SLO,
    Decision,
    Engine,
    Graph,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    Scheduler,
    Stage,
    VirtualClock,
    loop,
)
from neustream.core.events import Ended
from neustream.core.kv_cache import KVCache
from neustream.core.steps import StepProfile
from neustream.engine.events import Started
from neustream.graphs import llm, llm_profiles

STEP_S = 0.05
"""Seconds of every step, of images and of texts, in batches of any size."""
STEPS = StepProfile(
    "llm", LinearProfile("prefill", base=STEP_S, max_batch=999), LinearProfile("decode", base=STEP_S, max_batch=999)
)


def images(count, gap, steps, total, start=0.0):
    """Images of so many steps, one each `gap` seconds, within `total` seconds each."""
    return [("unet", start + at * gap, SLO(total=total), {"steps": steps}) for at in range(count)]


def texts(count, gap, outputs, first, step, models=("chat",), start=0.0):
    """Texts of so many outputs, of the models in turn."""
    params = {"prompt_tokens": 16, "max_tokens": outputs}
    return [(models[at % len(models)], start + at * gap, SLO(first=first, step=step), params) for at in range(count)]


def serve(policy, *loads, per_image=0.0, steps=STEPS, blocks=0, told=None):
    """What became of the requests, by kind: kept, lost (it ran, and not every promise was kept), refused.

    `told`: called with the end of each.
    """
    asked = sorted([one for load in loads for one in load], key=lambda one: one[1])
    models = {name for name, *_ in asked}
    graphs = {name: Graph(name, llm(name)) for name in models - {"unet"}}
    graphs["unet"] = Graph("image", loop(Stage("unet", 64), times=lambda job: job.params["steps"]))
    unet = LinearProfile("unet", base=STEP_S, per_job=per_image, max_batch=64)
    profiles = {"unet": unet}
    for name in sorted(models - {"unet"}):
        profiles |= llm_profiles(name, steps)
    requests = [
        Request(f"{'image' if name == 'unet' else 'text'}-{number}", graphs[name], at, slo, params)
        for number, (name, at, slo, params) in enumerate(asked)
    ]
    came, ran = Counter(), set()

    def see(record):
        match record:
            case Started(step=step):
                ran.update(step.ids)
            case Ended(id=id, on_time=on_time):
                if told is not None:
                    told(record)
                what = "kept" if on_time else "lost" if id in ran else "refused"
                came[f"{id.partition('-')[0]}s {what}"] += 1

    caches = {"chat": KVCache(blocks, 16)} if blocks else {}
    scheduler = Scheduler([Pool("gpu", tuple(profiles), kv_caches=caches)], policy, profiles)
    Engine(Member(scheduler, {"gpu": ProfiledExecutor()}), VirtualClock(), [see]).run(requests)
    return dict(came)


def one_of_each(image_total=3.0):
    """A scheduler with an image and a text, each after its first step."""
    image = Graph("image", loop(Stage("unet", 64), times=20))
    chat = Graph("chat", llm("chat"))
    profiles = {"unet": LinearProfile("unet", base=STEP_S, max_batch=64), **llm_profiles("chat", STEPS)}
    some = Scheduler([Pool("gpu", tuple(profiles))], FCFS(), profiles)
    some.submit(Request("image", image, 0.0, SLO(total=image_total)), 0.0)
    slo = SLO(first=0.5, step=0.1)
    some.submit(Request("text", chat, 0.0, slo, {"prompt_tokens": 8, "max_tokens": 20}), 0.0)
    for at, name in enumerate(("image", "text")):
        only = Hand(lambda view, name=name: Decision([job for job in view.jobs if job.id == name]))
        batch = some.next_batch("gpu", at * STEP_S, instead=only)
        some.finish(batch, [{}], (at + 1) * STEP_S)
    return some
