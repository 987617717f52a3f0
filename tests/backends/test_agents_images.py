"""Agents that call a pipeline, with and without a language model beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipelines import build
from texts import model_of
from toys import Flat

from neustream import Graph, GraphError, TableProfile, call, loop, par, seq, serve, tool
from neustream.backends.diffusers import PipelineMount
from neustream.backends.transformers import TextMount

PROFILES = {role: TableProfile(role, [1, 2, 4, 8, 16], [1e-3] * 5) for role in ("encode", "denoise", "decode")}
LIKE = {"prompt": "a house", "num_inference_steps": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def stock():
    """A pipeline, and what its stock call makes of a prompt."""
    pipe = build("stable_diffusion")

    def picture(prompt, seed, **more):
        return pipe(generator=seeded(seed), **{**LIKE, "prompt": prompt, **more}).images[0]

    return pipe, picture


def mount(pipe):
    return PipelineMount(pipe, samples=[], profiles=PROFILES, measure_s=0, progress=False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def painted(models, name, prompt, seed=0, like=LIKE, **more):
    """A call of the pipeline; `prompt`: of the job."""

    def arguments(job):
        return {**LIKE, "prompt": prompt(job), "generator": seeded(seed), **more}

    return models["sd"].call(name, arguments, like=like)


def test_a_pipeline_twice_in_a_row_and_at_the_same_time_beside_a_language_model(stock):
    pipe, picture = stock
    text = {"prompt": [5] * 8, "max_tokens": 3}

    def build_graph(models):
        plan = models["chat"].call("plan", lambda job: text, like=text)
        first = painted(models, "first", lambda job: job.params["prompt"])
        again = painted(models, "again", lambda job: f"{job.state['first'].images.shape}", 1)
        left = painted(models, "left", lambda job: "left", 2)
        right = painted(models, "right", lambda job: "right", 3)
        return Graph("agent", seq(plan, first, again, par(left=left, right=right)))

    chat = TextMount(model_of("opt"), profile=Flat(), slots=2)
    with serve({"sd": mount(pipe), "chat": chat, "agent": build_graph}) as service:
        answers = [service.submit(prompt=prompt, model="agent") for prompt in ("a tree", "a lake")]
        plain = service.submit(**LIKE, generator=seeded(9), model="sd")
        states = [answer.result(120) for answer in answers]
        same = plain.result(120).images[0]
    for prompt, state in zip(("a tree", "a lake"), states, strict=True):
        made = state["first"], state["again"], state["left"]["left"], state["right"]["right"]
        wanted = (prompt, 0), (f"{made[0].images.shape}", 1), ("left", 2), ("right", 3)
        for one, asked in zip(made, wanted, strict=True):
            assert np.allclose(one.images[0], picture(*asked), atol=1e-5)
        assert set(state) == {"plan", "first", "again", "left", "right"}
    assert np.allclose(same, picture(LIKE["prompt"], 9), atol=1e-5)


def test_in_a_call_of_calls_and_in_a_loop_each_round_is_its_own_picture(stock):
    pipe, picture = stock

    def count(given):
        return {"rounds": given.state.get("rounds", 0) + 1, "seen": [*given.state.get("seen", ()), given.state["one"]]}

    def build_graph(models):
        one = painted(models, "one", lambda job: f"{job.state.get('rounds', 0)}")
        rounds = loop(seq(call(one, "around"), tool("count", count)), until=lambda job: job.state["rounds"] == 3)
        return Graph("agent", rounds)

    with serve({"sd": mount(pipe), "agent": build_graph}) as service:
        seen = service.submit(model="agent").result(120)["seen"]
    for number, one in enumerate(seen):
        assert np.allclose(one.images[0], picture(f"{number}", 0), atol=1e-5)


def test_a_call_of_another_shape_than_its_like_fails_by_name(stock):
    pipe, _ = stock

    def build_graph(models):
        return Graph("agent", painted(models, "x", lambda job: "", height=32))

    with serve({"sd": mount(pipe), "agent": build_graph}) as service:
        with pytest.raises(GraphError, match="model 'sd' cannot serve call 'x': it differs from its `like` in more"):
            service.submit(model="agent").result(60)
        assert service.submit(**LIKE, model="sd").result(60).images.shape[0] == 1
