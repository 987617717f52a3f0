"""A service that nobody refers to any more: it serves what is open, ends, and its model is free again."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from functools import partial

import pytest
import torch
from pipelines import build
from texts import alone, made
from toys import Gate, Step, one_stage, table

import neustream as ns
from neustream.backends.claims import free
from neustream.backends.diffusers import PipelineMount
from neustream.backends.transformers import TextMount

WAIT_S = 60


class Flat:
    """Steps that take as long as others."""

    name, device = "llm", "here"

    def seconds(self, step):
        return 1e-3


def pictures(pipe, **options):
    return ns.serve(pipe, **{"samples": [], "progress": False, "measure_s": 0, **options})


def words(**change):
    return {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt", "generator": seeded(), **change}


def seeded():
    return torch.Generator().manual_seed(0)


def until(true):
    """Whether it comes about; what ends by itself takes a moment."""
    end = time.monotonic() + WAIT_S
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("neustream")]


def open_in(engine):
    return engine.snapshot().open


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


MODELS = {
    "pipeline": (lambda: build("stable_diffusion"), pictures, lambda service: service(**words())),
    "text": (
        lambda: made("opt", num_hidden_layers=1),
        lambda model: ns.serve(model, profile=Flat(), slots=2),
        lambda service: service([5, 6, 7], max_tokens=3),
    ),
}


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "forgotten"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_free_at_once(kind, closes, no_gc):
    make, serve, ask = MODELS[kind]
    before = workers()
    model = make()
    service = serve(model)
    ask(service)
    if closes:
        service.close()
    seen = weakref.ref(service)
    del service
    assert seen() is None
    assert until(lambda: not set(workers()) - set(before))
    seen = weakref.ref(model)
    del model
    assert seen() is None  # nothing has to be collected for that


@pytest.mark.parametrize("kind", MODELS)
def test_who_forgets_a_service_can_serve_its_model_again(kind):
    make, serve, ask = MODELS[kind]
    model = make()
    for _ in range(3):
        service = serve(model)
        ask(service)
        del service
    service = serve(model)
    service.myself = service  # a cycle: it is only collected
    del service
    with serve(model) as service:
        ask(service)


MOUNTS = {
    "pipeline": (partial(PipelineMount, samples=[], progress=False, measure_s=0), "diffusers"),
    "text": (partial(TextMount, profile=Flat(), slots=2), "transformers"),
}


@pytest.mark.parametrize("same", [False, True], ids=["another_mount", "the_same_mount"])
@pytest.mark.parametrize("kind", MOUNTS)
def test_who_wants_a_model_that_is_just_being_freed_waits_for_it(kind, same, monkeypatch):
    """The thread of a forgotten service is in the middle of giving its model back."""
    make, _, ask = MODELS[kind]
    mounted, backend = MOUNTS[kind]
    model = make()
    mount = mounted(model)
    following = mount if same else mounted(model)
    freeing, served = threading.Event(), threading.Event()

    def slowly(*args):
        freeing.set()
        served.wait(1)  # it is not: somebody waits for this
        free(*args)

    service = ns.serve({"a": mount})
    ask(service)
    with monkeypatch.context() as patched:
        patched.setattr(f"neustream.backends.{backend}.mount.free", slowly)
        del service
        assert freeing.wait(WAIT_S)
        service = ns.serve({"a": following})
    served.set()
    with service:
        ask(service)


def test_what_is_open_is_served_first():
    gate, others = Gate(), {*workers()}
    service = ns.serve(one_stage(), {"s": gate}, {"s": table("s", 0.001)})
    answers = [service.submit() for _ in range(2)]
    assert gate.began.wait(WAIT_S)
    own, seen = {*workers()} - others, weakref.ref(service)
    del service
    assert seen() is None and len(own) >= 2
    gate.go.set()
    assert [answer.result(WAIT_S)["out"] for answer in answers] == [answer.id for answer in answers]
    assert until(lambda: not own & {*workers()})


def test_a_request_that_is_still_to_be_looked_at_is_served_too():
    """Its service is gone, or closing, when the device has shown what it is."""
    pipe = build("stable_diffusion")
    stock = pipe(**words()).images
    assert torch.equal(pictures(pipe).submit(**words()).result(WAIT_S).images, stock)
    service = pictures(pipe)
    answer = service.submit(**words())
    service.close()
    assert torch.equal(answer.result(0).images, stock)


def test_a_model_that_is_wanted_again_is_waited_for():
    """The service before still serves what is open."""
    model = made("opt", num_hidden_layers=1)
    answer = ns.serve(model, profile=Flat(), slots=2).submit([5, 6, 7], max_tokens=60, ignore_eos=True)
    with ns.serve(model, profile=Flat(), slots=2) as service:
        assert answer.done()
        assert list(answer.result().token_ids) == alone(model, [5, 6, 7], 60, eos_token_id=-1)
        assert service([5, 6, 7], max_tokens=3).token_ids == answer.result().token_ids[:3]


def test_rehearsals_do_not_keep_a_service(tmp_path, no_gc):
    before = workers()
    service = pictures(build("stable_diffusion"), measure_s=30.0, cache=tmp_path)
    service(**words())
    assert until(partial(open_in, service.engine))  # nobody's but its own
    del service
    assert until(lambda: not set(workers()) - set(before))


CELL = """
service = ns.serve(pipe, samples=[], progress=False, measure_s=0)
images = service(**words()).images
"""


def test_a_cell_that_is_run_again_closes_the_service_before():
    pipe = build("stable_diffusion")
    scope = {"pipe": pipe, "ns": ns, "words": words}
    services = []
    for _ in range(3):
        exec(CELL, scope)
        services.append(scope["service"])
        assert torch.equal(scope["images"], pipe(**words()).images)
    for one in services[:2]:
        with pytest.raises(ns.RequestError, match="not serving"):
            one.submit(**words())
    services[2].close()


def test_at_a_prompt_the_service_before_is_closed(monkeypatch):
    model = made("opt", num_hidden_layers=1)
    first = ns.serve(model, profile=Flat(), slots=2)
    waits = first.submit([5, 6, 7], max_tokens=80, ignore_eos=True)
    with pytest.raises(ns.BackendError, match="its weights of OPTForCausalLM is served already"):
        ns.serve(model, profile=Flat(), slots=2)  # in a program that is somebody's mistake
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with ns.serve(model, profile=Flat(), slots=2) as second:
        assert waits.outcome(0).status in ("cancelled", "done")
        assert len(second([5, 6, 7], max_tokens=3).token_ids) == 3


def test_one_mount_in_two_services():
    pipe = build("stable_diffusion")
    mount = PipelineMount(pipe, samples=[], progress=False, measure_s=0)
    text = TextMount(made("opt", num_hidden_layers=1), profile=Flat(), slots=2)
    for one in (mount, text):
        with ns.serve({"a": one}), pytest.raises(ns.BackendError, match="this mount is served already"):
            ns.serve({"b": one})
        with pytest.raises(ns.BackendError, match="served once, got one under several names"):
            ns.serve({"a": one, "b": one})
    with ns.serve({"a": mount}) as service:
        assert service(**words()).images.shape == (1, 3, 16, 16)


def test_forgetting_an_engine_that_was_closed(no_gc):
    """Somebody closed the engine inside: the model is free all the same."""
    pipe = build("stable_diffusion")
    service = pictures(pipe)
    service.engine.close()
    del service
    with pictures(pipe) as service:
        assert service(**words()).images.shape == (1, 3, 16, 16)


def test_the_last_reference_may_go_on_the_service_s_own_thread():
    others = {*workers()}
    holds = {"service": ns.serve(one_stage(), {"s": Step()}, {"s": table("s", 0.001)})}
    own, seen = {*workers()} - others, weakref.ref(holds["service"])
    holds["service"].submit().add_done_callback(lambda _: holds.clear())
    assert until(lambda: seen() is None)
    assert until(lambda: not own & {*workers()})
