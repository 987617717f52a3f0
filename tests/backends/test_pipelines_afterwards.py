"""What is left of requests for a stock pipeline; its schedulers; compiled ones."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from diffusers import DDIMScheduler, EulerDiscreteScheduler
    from small_pipelines import DIT_SHAPE, SD_SHAPE, call, close_to, serve, words

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- what is left of a request ------------------------------------------------------------------------------


def tensors():
    gc.collect()
    return sum(1 for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def settled(engine, shape):
    """How many tensors there are once the worker holds nothing of requests that have ended."""
    executor = engine._devices[0].executor
    runs = executor._workers[0].modules[f"denoise@{shape}"]._runs
    deadline = time.monotonic() + 60
    while len(runs):
        assert time.monotonic() < deadline, f"{len(runs)} runs were not released"
        time.sleep(0.01)
    executor.call(lambda: None).result(timeout=60)  # what was released before is gone
    return tensors()


def test_tensors_of_ended_requests_are_gone(sd):
    with serve(sd, SD_SHAPE, policy="priced") as engine:
        engine(**words(0))
        engine.submit(**words(0, guidance_scale=1.0)).result(timeout=30)
        before = settled(engine, SD_SHAPE)
        engine(**words(1))
        assert settled(engine, SD_SHAPE) <= before, "done"
        with pytest.raises(ns.RequestError):
            engine.submit(**words(2), slo=1e-4).result(timeout=30)
        assert settled(engine, SD_SHAPE) <= before, "dropped"
        begun = threading.Event()
        answer = engine.submit(**words(3, steps=400), on_step=lambda progress: begun.set())
        begun.wait(30)
        answer.cancel()
        del answer
        engine(**words(4))
        assert settled(engine, SD_SHAPE) <= before, "cancelled"
        with pytest.raises(ns.RequestError):
            engine(**words(5, latents=torch.full((1, 4, 8, 8), float("nan"))))
        assert settled(engine, SD_SHAPE) <= before, "failed"


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_a_thousand_requests_leave_the_memory_they_found(dit):
    with serve(dit, DIT_SHAPE) as engine:

        def wave(count):
            for answer in [engine.submit(**call(at, steps=1)) for at in range(count)]:
                answer.result(timeout=120)

        wave(100)
        objects, memory = settled(engine, DIT_SHAPE), resident()
        for _ in range(10):
            wave(100)
        assert engine.report.counts["on_time"] == 1100
        assert settled(engine, DIT_SHAPE) <= objects
        assert resident() <= memory * 1.05


# -- compiled -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_per_bucket(dit):
    """Dynamo with the eager backend: the graphs are those of the buckets, the results those of stock."""
    expected = [dit(**call(at)).images for at in range(3)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with serve(dit, DIT_SHAPE, compile={"backend": backend}, buckets=(2, 8)) as engine:
        answers = [engine.submit(**call(at)) for at in range(3)]
        for answer, stock in zip(answers, expected, strict=True):
            assert close_to(answer.result(timeout=120).images, stock)
    assert 1 <= len(graphs) <= 2


def test_the_scheduler_class_of_each_request_is_its_own(sd):
    """A pipeline's scheduler may be replaced between requests; both kinds share batches."""
    other = DDIMScheduler.from_config(sd.scheduler.config, prediction_type="v_prediction")
    with serve(sd, SD_SHAPE) as engine:
        first = engine.submit(**words(1, steps=30))
        time.sleep(0.05)  # it has begun, with its own copy
        stock, sd.scheduler = sd.scheduler, other
        second = engine.submit(**words(2))
        assert close_to(second.result(timeout=60).images, sd(**words(2)).images)
        sd.scheduler = stock
        assert close_to(first.result(timeout=60).images, sd(**words(1, steps=30)).images)


def test_a_request_that_waits_has_the_scheduler_that_it_was_asked_with(sd):
    stock = sd.scheduler
    other = EulerDiscreteScheduler.from_config(stock.config)
    expected = sd(**words(1)).images
    with serve(sd, SD_SHAPE) as engine:
        gate = threading.Event()
        engine._devices[0].executor.call(gate.wait)
        first, sd.scheduler = engine.submit(**words(1)), other
        second, sd.scheduler = engine.submit(**words(1)), stock
        gate.set()
        assert close_to(first.result(timeout=60).images, expected)
        sd.scheduler = other
        assert close_to(second.result(timeout=60).images, sd(**words(1)).images)
        sd.scheduler = stock


def test_calls_that_change_what_requests_share_are_refused(sd):
    """Where their source does not show it, by the method that they call."""

    def helper(unet):
        unet.set_attn_processor(None)

    class Patching(type(sd)):
        def __call__(self, prompt):
            helper(self.unet)

    sd.__class__ = Patching
    with (
        serve(sd, SD_SHAPE, samples=[]) as engine,
        pytest.raises(ns.RequestFailed, match=r"calls set_attn_processor\(\) of a model in its call cannot share"),
    ):
        engine(prompt="x")


def test_a_call_in_inference_mode(dit):
    """Requests interleave inside of it, and none of them ends it for the others."""

    class Inferring(type(dit)):
        @torch.inference_mode()
        def __call__(self, class_labels, num_inference_steps=4, generator=None, output_type="pt"):
            return super().__call__(
                class_labels, num_inference_steps=num_inference_steps, generator=generator, output_type=output_type
            )

    expected = [dit(**call(at, steps=3 + at)).images for at in range(3)]
    dit.__class__ = Inferring
    with serve(dit, DIT_SHAPE) as engine:
        answers = [engine.submit(**call(at, steps=3 + at)) for at in range(3)]
        for answer, stock in zip(answers, expected, strict=True):
            images = answer.result(timeout=60).images
            assert images.is_inference() and close_to(images, stock)
