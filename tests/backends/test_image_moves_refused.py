"""Calls of pipelines that cannot move are refused by name; what moves is plain data."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from moved_calls import SCHEDULERS, Painter, finished, moved, one_thread, stepped, two  # noqa: F401
    from pipelines import (
        Run,
        build,
        parts_of,
        requests,
        stock,
    )
    from places import DEVICE

    from neustream import StageFailed, serve
    from neustream.backends.diffusers import journal, moves
    from neustream.backends.diffusers.journal import packed, unpacked
    from neustream.backends.diffusers.locals import needed
    from neustream.core.batch import input_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- refused by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("marigold", "MarigoldDepthPipeline cannot move .* it may keep more from step to step"),
        ("kandinsky_combined", "KandinskyV22CombinedPipeline cannot move .* it has pipelines inside"),
        ("animatediff", "AnimateDiffPipeline cannot move .* it may keep more"),
    ],
)
def test_pipelines_that_were_not_shown_to_move(name, why):
    run = stepped(build(name), requests(name)[0].arguments(), 1)
    with pytest.raises(StageFailed, match=why):
        moves.export(run)


class Mine(d.StableDiffusionPipeline):
    """Who knows what it does between its steps."""


def keep(pipe, step, timestep, given):
    return given


def test_subclasses_and_callbacks_stay():
    one, _ = two("stable_diffusion")
    mine = Mine(**one.components, requires_safety_checker=False)
    request = requests("stable_diffusion")[0]
    with pytest.raises(StageFailed, match="Mine cannot move"):
        moves.export(stepped(mine, request.arguments(), 1))
    with pytest.raises(StageFailed, match="its callback_on_step_end may have changed it"):
        moves.export(stepped(one, request.arguments(callback_on_step_end=keep), 1))


class Averaged(d.DDPMPipeline):
    """Feeds its model the mean of all latents so far."""

    __module__ = "diffusers.pipelines.averaged"

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps, batch_size=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        image = torch.randn(batch_size, 3, 8, 8, generator=generator).to(DEVICE)
        seen = []
        for t in self.scheduler.timesteps:
            seen.append(image)
            image = self.scheduler.step(
                self.unet(sum(seen) / len(seen), t).sample, t, image, generator=generator
            ).prev_sample
        return (image,)


class Momentum(d.DDPMPipeline):
    """Mixes what its model said before into what it says now: its model sees nothing of it."""

    __module__ = "diffusers.pipelines.momentum"

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps, batch_size=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        image = torch.randn(batch_size, 3, 8, 8, generator=generator).to(DEVICE)
        mean = 0.0
        for t in self.scheduler.timesteps:
            said = self.unet(image, t).sample
            mean = 0.5 * mean + said
            image = self.scheduler.step(mean, t, image, generator=generator).prev_sample
        return (image,)


class Attribute(Momentum):
    """The same, in an attribute of its own."""

    __module__ = "diffusers.pipelines.momentum"

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps, batch_size=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        image = torch.randn(batch_size, 3, 8, 8, generator=generator).to(DEVICE)
        self._mean = 0.0
        for t in self.scheduler.timesteps:
            said = self.unet(image, t).sample
            self._mean = 0.5 * self._mean + said
            image = self.scheduler.step(self._mean, t, image, generator=generator).prev_sample
        return (image,)


@pytest.mark.parametrize(("kind", "name"), [(Averaged, "seen"), (Momentum, "mean"), (Attribute, "self")])
def test_a_call_that_keeps_more_than_is_known_is_found_out(kind, name, monkeypatch):
    monkeypatch.setattr(journal, "FORWARD", journal.FORWARD | {kind.__name__})
    one = kind(**two("ddpm")[0].components)
    request = requests("ddpm")[1]
    run = stepped(one, request.arguments(), 3)
    with pytest.raises(StageFailed, match=rf"after 3 step\(s\) it keeps more than known, in __call__: {name}"):
        moved(run, one, request.arguments())
    start = stepped(one, request.arguments(), 0)  # in front of its first step it keeps nothing
    assert torch.equal(finished(moved(start, one, request.arguments())), stock(one, request))


def test_variables_that_are_written_before_they_are_read_are_not_needed():
    def walk(flag, total):
        kept, spent = 1, 2
        for step in range(total):
            spent = step + kept
            kept = spent if flag else kept
            yield
            unread = spent + step
            del unread
        return kept

    def names(flag, steps):
        walker = walk(flag, 9)
        for _ in range(steps):
            next(walker)
        return needed(walker.gi_frame, names.__code__)

    assert set(names(True, 2)) == {f"walk: {name}" for name in ("flag", "kept", "spent", "step")}
    one, other = names(True, 2), names(False, 2)
    assert {name for name in one if one[name] != other[name]} == {"walk: flag", "walk: kept"}


def test_another_pipeline_scheduler_or_request_is_refused():
    one, other = two("stable_diffusion")
    request = requests("stable_diffusion")[0]
    place = moves.export(stepped(one, request.arguments(), 2))

    def refused(pipe, why, **change):
        with pytest.raises(StageFailed, match=why):
            moves.bring(Run(pipe, parts_of(pipe), request.arguments(**change)), place)

    def elsewhere(family, why):
        pipe = build(family)
        with pytest.raises(StageFailed, match=why):
            moves.bring(Run(pipe, parts_of(pipe), requests(family)[0].arguments()), place)

    elsewhere("dit", "DiTPipeline cannot go on .* it was a StableDiffusionPipeline")
    refused(build("stable_diffusion", scheduler=SCHEDULERS["PNDM"]()), "its scheduler was a DDIMScheduler")
    refused(other, "has other arguments here|here of", num_images_per_prompt=2)
    refused(other, "keeps more than known|has other arguments|here of", guidance_scale=1.0)
    refused(other, r"it had 1 generator\(s\), here are 0", generator=None)
    new = moved(stepped(one, request.arguments(), 2), other, request.arguments())
    assert torch.equal(finished(new), stock(one, request))


def test_a_state_that_is_older_than_the_run_is_refused():
    one, _ = two("dit")
    with Painter(one) as host:
        host.ask("a", requests("dit")[0])
        host.steps(2)
        now = input_of(host.scheduler.jobs["a"])
        older = replace(now, state=dict(now.state))
        host.steps(1)
        with pytest.raises(StageFailed, match="stage 'denoise@8': request 'a' is in a step, or its state"):
            host.executor.export(older).result()


def test_what_cannot_be_pickled_is_named():
    with pytest.raises(StageFailed, match="cannot be pickled: a Linear"):
        packed({"model": torch.nn.Linear(2, 2)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_keep_their_bits_and_how_they_lie(dtype):
    tensor = (torch.randn(2, 3, 4, 5) * 3).to(dtype).to(memory_format=torch.channels_last)
    values = {"one": tensor, "same": tensor, "cut": tensor[:, 1:], "scalar": tensor[0, 0, 0, 0], "none": tensor[:0]}
    back = unpacked(pickle.loads(pickle.dumps(packed(values))), torch.device("cpu"))
    assert back["one"] is back["same"] and back["one"].stride() == tensor.stride()
    assert all(torch.equal(back[name], values[name]) and back[name].dtype == dtype for name in values)


# -- graphs are data --------------------------------------------------------------------------------------


def test_graphs_are_plain_data_and_a_pipeline_that_was_served_is_collected(tmp_path):
    pipe = build("dit")
    service = serve(pipe, samples=[], measure_s=0.0, cache=tmp_path, progress=False)
    arguments = requests("dit")[0].arguments()
    service.submit(**arguments).result()
    graphs = list(service.models[""].graphs)
    service.close()
    for graph in graphs:
        other = pickle.loads(pickle.dumps(graph))
        assert other.print == graph.print and list(other.stages) == list(graph.stages)
    model = weakref.ref(pipe.transformer)
    del pipe, service, arguments
    gc.collect()
    assert model() is None and graphs  # graphs that live on hold no model
