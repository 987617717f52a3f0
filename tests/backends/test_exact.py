"""What stock pipelines make of requests, and what the same requests get when they share steps with others."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from exactness import (  # noqa: F401
        EVERY,
        TOLERANCE,
        change,
        expected,
        furthest,
        last_latents,
        nothing_to_warn_of,
        one_by_one,
        one_thread,
        pipeline,
        scheduler_states,
        watched,
    )
    from pipelines import (
        FAMILIES,
        Request,
        alone,
        build,
        counted,
        difference,
        finish,
        noise,
        requests,
        stock,
        tensor_of,
        together,
    )
    from places import DEVICE

    from neustream.backends.diffusers.calls import PROVEN
    from neustream.backends.diffusers.parts import parts_of
    from neustream.backends.diffusers.run import Run, decode, denoise, encode

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- every family -----------------------------------------------------------------------------------------


@EVERY
def test_alone_is_bitwise_stock(name):
    outputs, _ = one_by_one(name)
    assert len(outputs) == 5
    assert all(torch.equal(output, reference) for output, reference in zip(outputs, expected(name), strict=True))


@EVERY
def test_alone_is_bitwise_stock_in_half_precision(name):
    pipe = build(name, torch.bfloat16)
    for request in requests(name, torch.bfloat16)[1:3]:
        assert torch.equal(alone(pipe, request), stock(pipe, request)), request


@EVERY
def test_together_is_stock_up_to_rounding(name):
    """And they share calls of the denoiser: some start later, nobody is in every step."""
    pipe, family = pipeline(name), FAMILIES[name]
    outputs, rows = watched(pipe, lambda parts: together(pipe, requests(name), parts))
    assert furthest(outputs, expected(name)) < family.tolerance
    _, apart = one_by_one(name)
    if not family.shared:
        assert sorted(rows) == sorted(apart)
        return
    assert len(rows) < 0.8 * len(apart)
    assert max(rows) > max(apart)
    assert sum(apart) <= sum(rows) <= sum(apart) + 2 * max(apart)  # a model that is new is tried alone first


@EVERY
def test_in_double_precision_rounding_is_all_there_is(name):
    """A mixed-up timestep, seed or guidance would change far more than this."""
    pipe, some = pipeline(name, "float64"), requests(name, torch.float64)
    if not FAMILIES[name].rounded:
        assert furthest(together(pipe, some), expected(name, "float64")) < TOLERANCE
        return
    # its pixels are float32 whatever its models compute in, its latents are not
    assert furthest(together(pipe, some), expected(name, "float64")) < 1e-6
    assert furthest(last_latents(pipe, some, apart=False), last_latents(pipe, some, apart=True)) < TOLERANCE


@EVERY
def test_in_a_fixed_bucket_nobody_changes_anybodys_bits(name):
    """Whoever comes along, in whatever order, and whoever leaves halfway."""
    pipe, some = pipeline(name), requests(name)
    parts = parts_of(pipe, buckets=(16,))
    seen = counted(parts)
    references = {at: alone(pipe, some[at], parts) for at in (0, 2, 4)}
    stays = together(pipe, some, parts, close=(3,))
    moves = together(pipe, some, parts, order=(4, 2, 0, 3, 1), pause=5, close=(1,))
    assert stays[3] is None and moves[1] is None
    if FAMILIES[name].shared:
        proven = {part.name for methods in parts.values() for part in methods.values() if part.owner in PROVEN}
        for part, rows in seen.items():  # the others are tried out, as they are and padded
            assert set(rows) == {16} or (part not in proven and 16 in rows)
    for at, reference in references.items():
        assert difference(reference, expected(name)[at]) < 10 * FAMILIES[name].tolerance
        assert torch.equal(stays[at], reference) and torch.equal(moves[at], reference)


@EVERY
def test_other_arguments_change_the_result_a_lot(name):
    """The control of the tests above."""
    family, request = FAMILIES[name], requests(name)[0]
    pipe, reference = pipeline(name), expected(name)[0]
    others = [Request(request.content, 99, steps=request.steps), Request(request.content, request.seed, steps=4)]
    if family.guided:
        others.append(Request({**request.content, "guidance_scale": 4.0}, request.seed, steps=request.steps))
    for other in others:
        assert difference(alone(pipe, other), reference) > 10 * family.tolerance, other


@EVERY
def test_serving_leaves_the_pipeline_as_it_was(name):
    pipe = pipeline(name)
    before, states = dict(vars(pipe)), scheduler_states(pipe)
    together(pipe, requests(name)[:2], close=(1,))
    assert vars(pipe).keys() == before.keys()
    assert all(value is before[key] for key, value in vars(pipe).items())
    assert scheduler_states(pipe) == states
    assert not torch.is_autocast_enabled(DEVICE.type) and not torch.is_inference_mode_enabled()


# -- what requests can ask for ----------------------------------------------------------------------------


def test_sizes_share_the_text_encoder_and_nothing_else():
    tall = {"height": 32, "width": 16}
    some = change("stable_diffusion", tall, {}, {"height": 16, "width": 24}, tall, {})
    pipe = pipeline("stable_diffusion")
    outputs = together(pipe, some)
    assert [tuple(output.shape[2:]) for output in outputs] == [(32, 16), (16, 16), (16, 24), (32, 16), (16, 16)]
    assert furthest(outputs, [stock(pipe, request) for request in some]) < 1e-5


def test_several_prompts_generators_and_latents_of_ones_own():
    pipe = pipeline("stable_diffusion")
    several = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    some = change(
        "stable_diffusion",
        {"prompt": ["a cat", "two dogs"], "negative_prompt": ["", "blurry"]},
        {"prompt": ["a cat", "two dogs"]},
        {"latents": noise(1, 2, 4, 8, 8)},
        {"eta": 0.5},  # noise: its steps are not shared
        {"output_type": "latent", "guidance_rescale": 0.7},
    )
    parts = parts_of(pipe)
    runs = [Run(pipe, parts, request.arguments()) for request in some]
    runs.append(Run(pipe, parts, some[1].arguments(generator=several)))
    finish(runs)
    references = [stock(pipe, request) for request in some]
    several = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    references.append(tensor_of(pipe(**some[1].arguments(generator=several))))
    assert furthest([tensor_of(run.output) for run in runs], references) < 1e-5
    assert tuple(references[4].shape) == (1, 4, 8, 8)


def test_schedules_of_ones_own():
    pipe = pipeline("stable_diffusion_xl")
    own = [{"timesteps": [900, 500, 100]}, {"sigmas": [10.0, 3.0, 0.5]}, {"denoising_end": 0.6}, {}, {}]
    some = change("stable_diffusion_xl", *own)
    for request in some[:2]:
        assert torch.equal(alone(pipe, request), stock(pipe, request))
    assert furthest(together(pipe, some), [stock(pipe, request) for request in some]) < 1e-5


def test_callbacks_change_a_request_as_they_would_in_the_stock_call():
    def damp(pipe, step, timestep, given):
        pipe._interrupt = step == 4
        return {"latents": given["latents"] * 0.9}

    pipe = pipeline("stable_diffusion")
    some = change("stable_diffusion", {}, {"callback_on_step_end": damp}, {"callback_on_step_end": damp}, {}, {})
    references = [stock(pipe, request) for request in some]
    assert difference(references[1], expected("stable_diffusion")[1]) > 1e-3
    pipe._interrupt = False
    assert furthest(together(pipe, some), references) < 1e-5
    assert not pipe._interrupt  # it was the request's own


def test_progress_of_steps():
    pipe, told = pipeline("flux"), []
    alone(pipe, requests("flux")[0], on_step=told.append)
    assert [(made.step, made.total) for made in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(tuple(made.latents.shape) == (1, 16, 16) for made in told)


def test_one_step_at_a_time():
    """What `denoise` promises: one step each, wherever they are; runs that are over stay as they are."""
    pipe = pipeline("stable_diffusion")
    parts = parts_of(pipe)
    runs = [Run(pipe, parts, request.arguments()) for request in requests("stable_diffusion")]
    denoise(runs[:2])
    assert [run.steps for run in runs] == [1, 1, 0, 0, 0]
    encode(runs)
    assert all(run.denoising for run in runs) and [run.steps for run in runs] == [1, 1, 0, 0, 0]
    denoise(runs)
    denoise(runs)
    assert [run.steps for run in runs] == [3, 3, 2, 2, 2]
    assert [run.denoising for run in runs] == [False, True, True, True, True]
    decode(runs[:1])
    assert runs[0].over and difference(tensor_of(runs[0].output), expected("stable_diffusion")[0]) < 1e-5
    decode(runs[:1])
    for run in runs[1:]:
        run.close()
    denoise(runs)
    assert [run.over for run in runs] == [True] * 5 and [run.steps for run in runs] == [3, 3, 2, 2, 2]
