"""Steps of schedulers: of a request's own, and taken together."""

from __future__ import annotations

import warnings
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from exactness import (  # noqa: F401
        PLACES,
        SCHEDULERS,
        STEPPED,
        TOLERANCE,
        furthest,
        nothing_to_warn_of,
        one_thread,
        pipeline,
        scheduled,
        tensors,
        with_scheduler,
    )
    from pipelines import (
        alone,
        build,
        counted,
        finish,
        requests,
        stock,
        tensor_of,
        together,
    )

    from neustream.backends.diffusers.parts import parts_of
    from neustream.backends.diffusers.run import Run, encode
    from neustream.backends.diffusers.stepping import Hooks, Step, own_scheduler, step_together, table_of

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- schedulers -------------------------------------------------------------------------------------------


@cache
def expected_of_scheduler(scheduler, dtype):
    pipe = with_scheduler(pipeline("stable_diffusion", dtype), scheduler)
    return [stock(pipe, request) for request in requests("stable_diffusion", getattr(torch, dtype))[:3]]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_alone_are_bitwise_stock(scheduler):
    pipe = with_scheduler(pipeline("stable_diffusion"), scheduler)
    for request, reference in zip(
        requests("stable_diffusion"), expected_of_scheduler(scheduler, "float32"), strict=False
    ):
        assert torch.equal(alone(pipe, request), reference), request


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", TOLERANCE)])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_together_are_stock_up_to_rounding(scheduler, dtype, tolerance):
    pipe = with_scheduler(pipeline("stable_diffusion", dtype), scheduler)
    outputs = together(pipe, requests("stable_diffusion", getattr(torch, dtype))[:3])
    assert furthest(outputs, expected_of_scheduler(scheduler, dtype)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", TOLERANCE)])
def test_one_batch_of_all_schedulers(dtype, tolerance):
    """Their timesteps are int64 or float32, their steps single or shared, two calls a step for Heun."""
    pipe = pipeline("stable_diffusion", dtype)
    parts = parts_of(pipe)
    seen, runs, references = counted(parts), [], []
    for at, scheduler in enumerate(SCHEDULERS):
        request = requests("stable_diffusion", getattr(torch, dtype))[at % 5]
        own = with_scheduler(pipe, scheduler)
        references.append(stock(own, request))
        runs.append(Run(own, parts, request.arguments()))
        encode(runs[-1:])
    finish(runs, apart=0)
    assert furthest([tensor_of(run.output) for run in runs], references) < tolerance
    assert max(seen["unet"]) >= 14


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("name", STEPPED)
def test_steps_taken_together_are_bitwise_stock(name, device, dtype):
    """Requests of other step counts, at other steps, with one image or two."""
    schedules = [scheduled(STEPPED[name](), steps, device) for steps in (3, 8, 5, 1, 20)]
    for tick in range(25):
        here = [(at, steps, tick - at) for at, steps in enumerate(schedules) if 0 <= tick - at < len(steps.timesteps)]
        if not here:
            continue
        pairs = [tensors(100 * tick + at, 1 + at % 2, dtype, device) for at, _, _ in here]
        waiting = [Step(table_of(steps), index, *pair) for (_, steps, index), pair in zip(here, pairs, strict=True)]
        for got, (_, steps, index), pair in zip(step_together(waiting), here, pairs, strict=True):
            want = steps.step(pair[0], steps.timesteps[index], pair[1], return_dict=False)
            assert len(got) == len(want)
            assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", STEPPED)
def test_latents_of_more_bits_than_the_model(name):
    """As in Wan: bfloat16 from the model, float32 latents."""
    steps = scheduled(STEPPED[name](), 6)
    output, sample = tensors(1, 2, "float32")
    output = output.to(torch.bfloat16)
    (got,) = step_together([Step(table_of(steps), 2, output, sample)])
    for t in steps.timesteps[:3]:  # Euler counts for itself
        want = steps.step(output, t, sample, return_dict=False)
    assert torch.equal(got[0], want[0])


def test_schedulers_of_one_class_with_other_configs_share_operations():
    makers = (STEPPED["DDIM"], STEPPED["DDIM to alpha one"], lambda: d.DDIMScheduler(beta_end=0.03, clip_sample=False))
    schedules = [scheduled(make(), 5) for make in makers]
    pairs = [tensors(at, 1, "float32") for at in range(3)]
    waiting = [Step(table_of(steps), 2, *pair) for steps, pair in zip(schedules, pairs, strict=True)]
    assert len({step.key for step in waiting}) == 1
    for got, steps, pair in zip(step_together(waiting), schedules, pairs, strict=True):
        assert torch.equal(got[0], steps.step(pair[0], steps.timesteps[2], pair[1])[0])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", STEPPED)
def test_a_requests_own_scheduler_is_the_stock_one(name, shared):
    """Step for step, return value for return value, whether steps are shared or left to the stock code."""
    template, told = STEPPED[name](), []
    before = repr(vars(template))
    own = own_scheduler(template, Hooks(lambda step: step_together([step])[0] if shared else None, told.append))
    stock_one = scheduled(STEPPED[name](), 7)
    own.set_timesteps(7)
    assert torch.equal(own.timesteps, stock_one.timesteps)
    mine = theirs = tensors(0, 1, "float32")[1]
    for at, t in enumerate(own.timesteps):
        output = tensors(at + 1, 1, "float32")[0]
        got, want = own.step(output, t, mine), stock_one.step(output, t, theirs)
        assert type(got) is type(want) and got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
        assert getattr(own, "step_index", None) == getattr(stock_one, "step_index", None)
        mine, theirs = got.prev_sample, want.prev_sample
    assert len(told) == 7 and torch.equal(told[-1], mine)
    assert repr(vars(template)) == before  # the one that others copy


@pytest.mark.parametrize("scheduler", ["Euler", "DDIM", "DDPM"])
def test_dit_with_any_scheduler(scheduler):
    """Stock DiT scales its input and goes on from what it scaled, which Euler does not expect: so do we."""
    pipe = build("dit", scheduler=SCHEDULERS[scheduler]())
    for request in requests("dit"):
        torch.manual_seed(3)  # DiT gives its scheduler no generator
        reference = stock(pipe, request)
        torch.manual_seed(3)
        assert torch.equal(alone(pipe, request), reference), request
    if scheduler != "DDPM":
        assert furthest(together(pipe, requests("dit")), [stock(pipe, request) for request in requests("dit")]) < 1e-5
