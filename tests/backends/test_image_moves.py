"""Calls of pipelines that move in the middle: the same bits as those that stay, or a refusal by name."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from dataclasses import replace
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
        requests,
        stock,
        tensor_of,
    )

    from neustream import Stage, StageFailed, TableProfile, serve
    from neustream.backends.diffusers import journal, moves
    from neustream.backends.diffusers.journal import packed, unpacked
    from neustream.backends.diffusers.locals import needed
    from neustream.backends.diffusers.modules import RunModule, Runs, graph_of
    from neustream.core.batch import StepInput, input_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

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


# -- exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOVED)
def test_a_call_that_moves_at_any_step_is_bitwise_stock(name):
    one, other = two(name)
    assert type(one).__name__ in journal.FORWARD
    for at in (0, 2):
        request = requests(name)[at]
        wanted = stock(one, request)
        outputs = each_step(one, other, request)
        assert len(outputs) >= 3
        assert all(torch.equal(output, wanted) for output in outputs), at


def test_each_pipeline_that_may_move_is_in_these_tests():
    assert {type(two(name)[0]).__name__ for name in MOVED} == journal.FORWARD


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_with_memory_and_noise_move_too(name):
    pipes = [build("stable_diffusion", scheduler=SCHEDULERS[name]()) for _ in range(2)]
    request = requests("stable_diffusion")[2]
    wanted = stock(pipes[0], request)
    outputs = each_step(*pipes, request)
    assert len(outputs) >= 4
    assert all(torch.equal(output, wanted) for output in outputs)


def test_in_half_precision_and_there_and_back_again():
    one, other = build("stable_diffusion_xl", torch.bfloat16), build("stable_diffusion_xl", torch.bfloat16)
    request = requests("stable_diffusion_xl", torch.bfloat16)[1]
    arguments = request.arguments()
    run = stepped(one, arguments, 0)
    for at in range(request.steps):
        arguments = pickle.loads(pickle.dumps(arguments))
        run = moved(run, (other, one)[at % 2], arguments)
        arguments = run.kwargs
        denoise([run])
    assert torch.equal(finished(run), stock(one, request))


def test_the_order_in_which_a_process_keeps_defaults_is_nothing():
    one, other = build("stable_diffusion"), build("stable_diffusion")
    known = dict(other.scheduler.config)
    known["_use_default_values"] = known["_use_default_values"][::-1]
    other.scheduler._internal_dict = type(other.scheduler.config)(known)
    request = requests("stable_diffusion")[0]
    arguments = request.arguments()
    new = moved(stepped(one, arguments, 2), other, arguments)
    assert torch.equal(finished(new), stock(one, request))


def test_noise_without_a_generator_is_what_it_was():
    one, other = two("stable_diffusion_img2img")
    request = requests("stable_diffusion_img2img")[0]
    torch.manual_seed(5)
    wanted = tensor_of(one(**request.arguments(generator=None)))
    torch.manual_seed(5)
    run = stepped(one, request.arguments(generator=None), 2)
    assert run.journal.draws
    torch.manual_seed(6)
    before = torch.get_rng_state()
    new = moved(run, other, request.arguments(generator=None))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(finished(new), wanted)


def test_layers_that_nobody_looked_at_are_not_kept():
    one, _ = two("stable_diffusion_xl")
    run = stepped(one, requests("stable_diffusion_xl")[0].arguments(), 2)
    layers = [made.result["hidden_states"] for made in run.journal.calls if made.name.startswith("text_encoder")]
    assert layers and all(sum(isinstance(x, torch.Tensor) for x in some) == 1 for some in layers)


# -- through schedulers -----------------------------------------------------------------------------------


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


class Told:
    """An observer of steps that can be pickled."""

    seen = ()

    def __call__(self, progress):
        Told.seen += (progress.step,)


def test_a_request_that_moves_with_its_place_in_the_graph():
    one, other = two("stable_diffusion")
    request = requests("stable_diffusion")[0]
    wanted = stock(one, request)
    for at in range(request.steps + 2):
        Told.seen = ()
        with Painter(one) as source, Painter(other) as target:
            source.ask("a", request, on_step=Told())
            source.steps(at)
            pieces = target.arrive(source.leave("a"))
            assert len(pieces) == (at > 0)
            target.finish()
            assert torch.equal(target.image("a"), wanted), at
        assert Told.seen == (1, 2, 3)  # each step is told of once
    assert len(source.runs) == len(target.runs) == 0


def test_a_call_that_is_over_takes_its_output_along():
    """A config's graph has a decode behind the steps, whatever they left to do."""
    one, other = two("dit")
    request = requests("dit")[0]
    run = stepped(one, request.arguments(output_type="latent"), request.steps)
    decode([run])
    state = {"denoising": False, "left": 1, "over": True, "output": run.output}
    runs = Runs(lambda given: Run(other, parts_of(other), request.arguments()))
    [update] = runs.step("decode", [StepInput("a", {}, state, "decode@8")])
    assert update == {**state, "output": run.output}
    runs.release("a")
    assert len(runs) == 0


def test_others_on_both_sides_get_what_they_get_anyway():
    one, other = two("dit")
    some = requests("dit")
    wanted = [stock(one, request) for request in some[:4]]
    with Painter(one) as source, Painter(other) as target:
        for at, host in enumerate((source, source, target, target)):
            host.ask(str(at), some[at])
        source.steps(3)
        target.steps(2)
        target.arrive(source.leave("1"))
        source.finish()
        target.finish()
        got = [(source, target, target, target)[at].image(str(at)) for at in range(4)]
    for x, y in zip(got, wanted, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


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
        image = torch.randn(batch_size, 3, 8, 8, generator=generator)
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
        image = torch.randn(batch_size, 3, 8, 8, generator=generator)
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
        image = torch.randn(batch_size, 3, 8, 8, generator=generator)
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
