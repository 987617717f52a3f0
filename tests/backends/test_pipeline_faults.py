"""A stock pipeline behind an engine: bad input, and what goes wrong."""

from __future__ import annotations

import os
import threading
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler
    from small_pipelines import DIT_SHAPE, SD_SHAPE, call, close_to, seeded, serve, words

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stepz": 3}, TypeError, "unexpected keyword argument 'stepz'"),
        (
            {"num_inference_steps": 0},
            ns.RequestError,
            "num_inference_steps must be a whole number from 1 to 100000, got 0",
        ),
        ({"num_inference_steps": -3}, ns.RequestError, "got -3"),
        ({"num_inference_steps": 2.5}, ns.RequestError, "got 2.5"),
        ({"num_inference_steps": 2000}, ValueError, "2000"),
        ({"class_labels": None}, TypeError, None),
    ],
)
def test_bad_arguments_are_the_pipelines_own_errors_before_anything_is_queued(dit, change, error, message):
    with serve(dit, DIT_SHAPE) as engine:
        with pytest.raises(error, match=message):
            engine.submit(**call(1, **change)) if "class_labels" not in change else engine.submit(
                **{**call(1), **change}
            )
        assert engine.report.submitted == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 20, "width": 16}, "divisible by 8"),
        ({"negative_prompt_embeds": torch.zeros(1, 77, 32), "negative_prompt": "x"}, "negative_prompt_embeds"),
    ],
)
def test_what_check_inputs_says(sd, change, message):
    with serve(sd, SD_SHAPE) as engine:
        generator = seeded(5)
        with pytest.raises(ValueError, match=message):
            engine.submit(**{**words(1), "generator": generator, **change})
        assert torch.equal(generator.get_state(), seeded(5).get_state())  # nothing was drawn
        assert engine.report.submitted == 0


def test_a_generator_draws_for_one_request_at_a_time(dit):
    with serve(dit, DIT_SHAPE) as engine:
        mine = seeded(1)
        answer = engine.submit(**{**call(1, steps=100), "generator": mine}, id="first")
        with pytest.raises(ns.RequestError, match="in use by another request"):
            engine.submit(**{**call(2), "generator": mine})
        answer.result(timeout=60)
        again = engine.submit(**{**call(2), "generator": mine})  # free again, and further on, as in stock
        stock = seeded(1)
        dit(**{**call(1, steps=100), "generator": stock})
        assert torch.equal(again.result(60).images, dit(**{**call(2), "generator": stock}).images)


def test_a_duplicate_id(dit):
    with serve(dit, DIT_SHAPE) as engine:
        first = engine.submit(**call(1, steps=100), id="x")
        with pytest.raises(ns.RequestError, match="'x' is already being served"):
            engine.submit(**call(2), id="x")
        first.result(timeout=60)


@pytest.mark.parametrize(("what", "message"), [("text", "got 'a pipeline'"), ("nothing", "its models: none")])
def test_what_cannot_be_served(what, message):
    class Nothing(DiffusionPipeline):
        def __call__(self, prompt):
            return prompt

    with pytest.raises(ns.BackendError, match=message):
        ns.serve("a pipeline" if what == "text" else Nothing())


def test_a_pipeline_whose_arguments_are_taken(dit):
    class Odd(type(dit)):
        def __call__(self, class_labels, slo=1):
            return slo

    dit.__class__ = Odd
    with pytest.raises(ns.BackendError, match=r"\['slo'\], which submit\(\) takes itself"):
        serve(dit, DIT_SHAPE)


def test_a_policy_by_name(dit):
    with pytest.raises(ns.ConfigError, match="did you mean 'fcfs'"):
        serve(dit, DIT_SHAPE, policy="fcsf")


# -- faults -------------------------------------------------------------------------------------------------


def wrapped(engine, make):
    """Have the denoiser's calls made by `make(its own function)`; returns that function."""
    (part,) = engine.models[""].parts("denoise")
    stock, part.function = part.function, make(part.function)
    return stock


def limited(engine, most):
    """Make a denoiser that runs out of memory above `most` rows; returns the row counts it was called with."""
    seen = []

    def make(stock):
        def function(*args, **kwargs):
            rows = len(args[0] if args else kwargs["hidden_states"])
            seen.append(rows)
            if rows > most:
                raise torch.OutOfMemoryError(f"no room for {rows} rows")
            return stock(*args, **kwargs)

        return function

    wrapped(engine, make)
    return seen


def test_out_of_memory_halves_the_batch_and_is_remembered(dit, caplog):
    expected = [dit(**call(at, guidance_scale=1.0)).images for at in range(4)]
    with serve(dit, DIT_SHAPE) as engine:
        seen = limited(engine, 2)
        engine(**call(9, guidance_scale=1.0))
        gate = threading.Event()
        engine._devices[0].executor.call(gate.wait)  # until all are there
        answers = [engine.submit(**call(at, guidance_scale=1.0)) for at in range(4)]
        gate.set()
        images = [answer.result(timeout=60).images for answer in answers]
        assert engine.report.counts["on_time"] == 5
    (large,) = [rows for rows in seen if rows > 2]  # not in every step
    told = f"transformer: out of memory with {large} rows; from now on at most {large // 2} such rows run together"
    assert told in caplog.messages
    for ours, stock in zip(images, expected, strict=True):
        assert close_to(ours, stock)


def test_a_request_that_never_fits_fails_alone(dit):
    with serve(dit, DIT_SHAPE) as engine:
        limited(engine, 2)
        with pytest.raises(ns.RequestError, match="transformer: out of memory with 8 row"):
            engine(**{**call(1), "class_labels": [1, 2, 3, 4]})
        assert engine(**call(2)).images.shape == (1, 3, 16, 16)


def test_latents_that_are_not_finite_fail_before_they_are_decoded(sd):
    bad = torch.full((1, 4, 8, 8), float("nan"))
    with serve(sd, SD_SHAPE) as engine:
        broken, fine = engine.submit(**words(1, latents=bad)), engine.submit(**words(2))
        with pytest.raises(ns.RequestError, match="NaN or infinity after 4 steps"):
            broken.result(timeout=60)
        assert close_to(fine.result(timeout=60).images, sd(**words(2)).images)
    with serve(sd, SD_SHAPE, check_finite=False) as engine:
        assert engine(**words(1, latents=bad)).images.isnan().any()  # as in stock


def test_a_callback_that_raises_fails_its_request_alone(dit):
    def bad(progress):
        if progress.step == 2:
            raise LookupError("no such preview")

    with serve(dit, DIT_SHAPE) as engine:
        broken, fine = engine.submit(**call(1), on_step=bad), engine.submit(**call(2))
        with pytest.raises(ns.RequestError, match="LookupError: no such preview"):
            broken.result(timeout=60)
        assert close_to(fine.result(timeout=60).images, dit(**call(2)).images)
        assert engine.report.counts == {"on_time": 1, "late": 0, "dropped": 0, "failed": 1, "cancelled": 0}


def test_a_request_that_a_model_cannot_take_fails_alone(dit):
    """It raises for the whole batch; who is to blame is found out."""

    def picky(stock):
        def function(*args, **kwargs):
            if 13 in kwargs["class_labels"]:
                raise ArithmeticError("bad luck")
            return stock(*args, **kwargs)

        return function

    with serve(dit, DIT_SHAPE) as engine:
        engine(**call(1))
        gate = threading.Event()
        engine._devices[0].executor.call(gate.wait)  # until all are there
        wrapped(engine, picky)
        answers = [engine.submit(**call(at)) for at in (12, 13, 14)]
        gate.set()
        with pytest.raises(ns.RequestError, match="ArithmeticError: bad luck"):
            answers[1].result(timeout=60)
        assert close_to(answers[0].result(60).images, dit(**call(12)).images)
        assert close_to(answers[2].result(60).images, dit(**call(14)).images)


def test_a_model_that_raises_fails_the_requests_in_that_call(dit):
    with serve(dit, DIT_SHAPE) as engine:
        stock = wrapped(engine, lambda _: lambda *args, **kwargs: (_ for _ in ()).throw(ArithmeticError("bad kernel")))
        with pytest.raises(ns.RequestError, match="ArithmeticError: bad kernel"):
            engine(**call(1))
        wrapped(engine, lambda _: stock)
        assert torch.equal(engine(**call(1)).images, dit(**call(1)).images)


def test_a_pipeline_that_is_changed_while_it_is_served(sd):
    with serve(sd, SD_SHAPE) as engine:
        engine(**words(1))
        sd.scheduler = EulerDiscreteScheduler.from_config(sd.scheduler.config)  # requests copy theirs: allowed
        assert torch.equal(engine(**words(1)).images, sd(**words(1)).images)
        unet, sd.unet = sd.unet, torch.nn.Linear(1, 1)
        with pytest.raises(ns.RequestError, match="unet of StableDiffusionPipeline was replaced"):
            engine.submit(**words(2))
        sd.unet = unet.to(torch.float64)
        with pytest.raises(ns.RequestError, match="unet of StableDiffusionPipeline was moved or changed"):
            engine.submit(**words(2))
        sd.unet.to(torch.float32)
        assert engine(**words(1)).images.shape == (1, 3, 16, 16)


def test_two_engines_on_one_pipeline(dit):
    with (
        serve(dit, DIT_SHAPE),
        pytest.raises(ns.BackendError, match="transformer of DiTPipeline is served already: close that service first"),
    ):
        serve(dit, DIT_SHAPE)
    with serve(dit, DIT_SHAPE) as engine:
        assert engine(**call(1)).images.shape == (1, 3, 16, 16)


def test_after_a_fork_the_child_is_told(dit):
    with serve(dit, DIT_SHAPE) as engine:
        engine(**call(1))
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # pragma: no cover  # another process
            try:
                engine.submit(**call(2))
            except ns.RequestError as error:
                os.write(writing, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        assert f"lives in process {os.getpid()}" in os.read(reading, 1000).decode()
        os.close(reading)
        assert engine(**call(2)).images.shape == (1, 3, 16, 16)


def test_closing(dit):
    engine = serve(dit, DIT_SHAPE)
    open_ones = [engine.submit(**call(at, steps=500)) for at in range(2)]
    engine.close(cancel=True)
    for answer in open_ones:
        with pytest.raises(ns.RequestError, match="cancelled"):
            answer.result(timeout=30)
    for known in (True, False):  # a shape that would have to be looked at first
        with pytest.raises(ns.RequestError, match="not serving"):
            engine.submit(**call(1, guidance_scale=4.0 if known else 1.0))
