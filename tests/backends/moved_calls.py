"""Calls of pipelines that are moved in the middle."""

from __future__ import annotations

import pickle
import warnings
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from moving import Host
    from pipeline_parts import BETAS
    from pipelines import (
        FAMILIES,
        Run,
        build,
        counted,
        decode,
        denoise,
        encode,
        parts_of,
        tensor_of,
    )

    from neustream import Stage, TableProfile
    from neustream.backends.diffusers import moves
    from neustream.backends.diffusers.modules import RunModule, Runs, graph_of

SPACED = {**BETAS, "steps_offset": 1}
SCHEDULERS = {
    "PNDM": lambda: d.PNDMScheduler(**SPACED, skip_prk_steps=True),
    "LMS": lambda: d.LMSDiscreteScheduler(**SPACED),
    "Euler": lambda: d.EulerDiscreteScheduler(**SPACED),
    "Euler ancestral": lambda: d.EulerAncestralDiscreteScheduler(**SPACED),
    "DPM++ 2M Karras": lambda: d.DPMSolverMultistepScheduler(**SPACED, use_karras_sigmas=True),
    "DPM++ 2M SDE": lambda: d.DPMSolverMultistepScheduler(**SPACED, algorithm_type="sde-dpmsolver++"),
    "UniPC": lambda: d.UniPCMultistepScheduler(**SPACED),
    "DEIS": lambda: d.DEISMultistepScheduler(**SPACED),
    "Heun": lambda: d.HeunDiscreteScheduler(**SPACED),
    "KDPM2": lambda: d.KDPM2DiscreteScheduler(**SPACED),
    "LCM": lambda: d.LCMScheduler(**SPACED),
    "DDPM": lambda: d.DDPMScheduler(**BETAS, clip_sample=False),
}
MOVED = [name for name in FAMILIES if name not in ("animatediff", "kandinsky_combined", "marigold")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@cache
def two(name):
    """A family's pipeline, twice: models of their own with the same weights."""
    return build(name), build(name)


def stepped(pipe, arguments, steps, parts=None):
    """A run after so many denoising steps."""
    run = Run(pipe, parts or parts_of(pipe), arguments)
    encode([run])
    for _ in range(steps):
        denoise([run])
    return run


def finished(run):
    while run.denoising:
        denoise([run])
    decode([run])
    if run.error is not None:
        raise run.error
    return tensor_of(run.output)


def moved(run, pipe, arguments, parts=None):
    """The same call on another pipeline, brought to where `run` is."""
    place = pickle.dumps(moves.export(run))
    new = Run(pipe, parts or parts_of(pipe), pickle.loads(pickle.dumps(arguments)))
    moves.bring(new, pickle.loads(place))
    assert (new.steps, new.left, new.denoising) == (run.steps, run.left, run.denoising)
    return new


def each_step(one, other, request):
    """What becomes of a request that moves after 0, 1, 2, ... steps, until it is over."""
    parts = parts_of(other)
    seen, outputs = counted(parts), []
    for steps in range(100):
        arguments = request.arguments()
        run = stepped(one, arguments, steps)
        if run.over or run.steps < steps:
            return outputs
        before = {name: list(rows) for name, rows in seen.items()}
        new = moved(run, other, arguments, parts)
        assert seen == before  # no model has run
        outputs.append(finished(new))
    raise AssertionError("it does not end")


class Painter(Host):
    """A host of one pipeline."""

    def __init__(self, pipe, name="sd"):
        parts = parts_of(pipe)

        def begin(given):
            told = given.params.get("on_step")
            return Run(pipe, parts, given.params["arguments"], expected=given.params["steps"], on_step=told)

        self.runs = Runs(begin)
        roles = {role: Stage(f"{role}@8", max_batch=4) for role in ("encode", "denoise", "decode")}
        graph = graph_of(name, roles)
        profiles = {stage: TableProfile(stage, range(1, 5), [1.0] * 4) for stage in graph.stages}
        module = RunModule(self.runs, {f"{role}@8": role for role in roles})
        super().__init__(graph, {f"{role}@8": module for role in roles}, profiles=profiles)

    def ask(self, id, request, **params):
        self.submit(id, {"arguments": request.arguments(), "steps": request.steps, **params})

    def image(self, id):
        return tensor_of(self.ended[id].output["output"])
