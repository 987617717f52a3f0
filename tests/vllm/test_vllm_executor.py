"""A vLLM engine as one stage of a graph."""

from __future__ import annotations

import threading

import pytest

from neustream.core.graph import Graph, Stage, seq
from neustream.core.policies import FCFS
from neustream.core.policy import Pool
from neustream.core.profile import TableProfile
from neustream.core.scheduler import Scheduler
from neustream.core.types import SLO
from neustream.engine.clock import WallClock
from neustream.engine.engine import Engine
from neustream.engine.executor import ThreadExecutor
from neustream.engine.member import Member

OURS = "neustream.backends.vllm.SLOScheduler"


class Look:
    """A stage in front of the model."""

    def load(self, device):
        pass

    def step(self, inputs):
        return [{"seen": True} for _ in inputs]


@pytest.fixture
def serve(engines):
    from neustream.backends.vllm import VLLMExecutor

    rig = engines(OURS, additional_config={"neustream": {"policy": "edf"}})
    look, write = Stage("look", max_batch=4), Stage("write")
    graph = Graph("write", seq(look, write))
    profiles = {"look": TableProfile("look", [1, 4], [0.001, 0.001]), "write": TableProfile("write", [1], [0.02])}
    scheduler = Scheduler([Pool("cpu", ("look",)), Pool("llm", ("write",), workers=6)], FCFS(), profiles)
    executors = {"cpu": ThreadExecutor({"look": Look()}), "llm": VLLMExecutor(rig.llm)}
    with Engine(Member(scheduler, executors), WallClock()) as engine:
        engine.graph, engine.rig = graph, rig
        yield engine
    rig.assert_empty()


def request(engine, id, tokens=8, prompt=20, slo=None):
    params = {
        "prompt": {"prompt_token_ids": [7] * prompt},
        "sampling": {"max_tokens": tokens, "temperature": 0, "ignore_eos": True},
    }
    return engine.submit(engine.graph, params, slo=slo, id=id)


def test_generations_share_the_engine(serve):
    steps = serve.rig.scheduler.stats.steps
    answers = [request(serve, f"r{at}", tokens=40) for at in range(6)]
    ends = [answer.result(60) for answer in answers]
    assert [end.status for end in ends] == ["done"] * 6
    assert all(len(end.output["tokens"]) == 40 and end.output["finish_reason"] == "length" for end in ends)
    assert len({end.output["tokens"] for end in ends}) == 1  # one prompt, greedy
    assert serve.rig.scheduler.stats.steps - steps < 3 * 40  # not one after the other


def test_the_time_that_is_left_is_the_inner_slo(serve):
    seen = []
    add = serve.rig.scheduler.add_request

    def spy(request):
        seen.append(request.sampling_params.extra_args)
        add(request)

    serve.rig.scheduler.add_request = spy
    try:
        assert request(serve, "r", slo=SLO(total=50.0, weight=3.0)).result(60).status == "done"
        assert request(serve, "free").result(60).status == "done"
    finally:
        del serve.rig.scheduler.add_request
    assert seen[0]["slo_weight"] == 3.0 and 45_000 < seen[0]["slo_total_ms"] < 50_000
    assert seen[1] is None


def test_what_the_inner_scheduler_gives_up_fails_with_its_reason(serve):
    for at in range(3):  # it learns how long steps take
        request(serve, f"r{at}", tokens=60, slo=SLO(total=60.0)).result(60)
    end = request(serve, "late", tokens=480, slo=SLO(total=0.1)).result(60)
    assert end.status == "failed" and "'abort': slo: hopeless" in end.reason


def test_a_generation_whose_request_is_cancelled_ends_in_vllm_too(serve):
    seen = threading.Semaphore(0)
    run = serve.rig.core.model_executor.execute_model

    def watched(*args, **kwargs):
        seen.release()
        return run(*args, **kwargs)

    serve.rig.core.model_executor.execute_model = watched
    try:
        others = [request(serve, f"other{at}", tokens=20) for at in range(2)]
        for _ in range(5):  # more than the stage has seats in all, were they not given back
            steps = serve.rig.scheduler.stats.steps
            answers = [request(serve, f"r{at}", tokens=400) for at in range(4)]
            for _ in range(4):
                assert seen.acquire(timeout=60)
            assert all(answer.cancel() for answer in answers)
            assert request(serve, "next", tokens=2).result(60).status == "done"
            assert serve.rig.scheduler.stats.steps - steps < 200
    finally:
        del serve.rig.core.model_executor.execute_model
    assert [other.result(60).status for other in others] == ["done"] * 2, "nobody else is in it"
    assert not serve.rig.scheduler.requests


def test_a_prompt_that_vllm_refuses_fails_alone(serve):
    answers = [request(serve, "long", prompt=600), request(serve, "fine"), request(serve, "none", prompt=0)]
    assert [answer.result(60).status for answer in answers] == ["failed", "done", "failed"]
    assert "600" in answers[0].result().reason or "maximum" in answers[0].result().reason
    assert request(serve, "zero", tokens=0).result(60).status == "failed"


def test_an_engine_error_fails_its_step_and_no_other(serve):
    run = serve.rig.core.model_executor.execute_model

    def broken(*args, **kwargs):
        serve.rig.core.model_executor.execute_model = run
        raise RuntimeError("the device fell off")

    serve.rig.core.model_executor.execute_model = broken
    end = request(serve, "r", slo=SLO(total=60.0)).result(60)
    assert end.status == "failed" and "the device fell off" in end.reason
    assert request(serve, "next", slo=SLO(total=60.0)).result(60).status == "done"
