"""Calls of pipelines that move in the middle: the same bits as those that stay."""

from __future__ import annotations

import pickle
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from moved_calls import (  # noqa: F401
        MOVED,
        SCHEDULERS,
        Painter,
        each_step,
        finished,
        moved,
        one_thread,
        stepped,
        two,
    )
    from pipelines import (
        Run,
        build,
        decode,
        denoise,
        parts_of,
        requests,
        stock,
        tensor_of,
    )

    from neustream.backends.diffusers import journal
    from neustream.backends.diffusers.modules import Runs
    from neustream.core.batch import StepInput

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

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
