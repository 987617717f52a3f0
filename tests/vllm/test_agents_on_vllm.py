"""Agents whose calls are made by a vLLM engine of the same service."""

from __future__ import annotations

import pytest
from planner import ask, ids, plan_and_write

from neustream import Graph, par, serve

LIKE = {"prompt": [5] * 8, "max_tokens": 6}
PROMPTS = [[4 + (7 * at + 13 * number) % 500 for at in range(20 + number)] for number in range(6)]
SOON = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def rig(engines):
    return engines(seed=2)


@pytest.fixture
def mount(rig):
    from neustream.backends.vllm import VLLMMount

    yield VLLMMount(rig.llm)
    rig.assert_empty()


@pytest.fixture(scope="module")
def alone(rig):
    """What vLLM itself makes of a prompt."""
    from vllm import SamplingParams

    def made(prompt):
        [found] = rig.llm.generate(
            [{"prompt_token_ids": prompt}], SamplingParams(temperature=0, **SOON), use_tqdm=False
        )
        return list(found.outputs[0].token_ids)

    return made


def test_calls_of_agents_are_texts_of_vllm_beside_plain_ones(mount, alone):
    expected = [alone(prompt) for prompt in PROMPTS]
    written = [alone(tokens[::-1]) for tokens in expected]
    with serve({"chat": mount, "agent": lambda models: plan_and_write(models, **SOON)}) as service:
        answers = [service.submit(prompt=prompt, model="agent") for prompt in PROMPTS]
        plain = [service.submit(prompt, model="chat", **SOON) for prompt in PROMPTS]
        for answer, plan, write in zip(answers, expected, written, strict=True):
            state = answer.result(60)
            assert ids(state["plan"]) == plan and ids(state["write"]) == write
        assert [ids(answer.result(60)) for answer in plain] == expected
    legs = service.report.to_dict()["legs"]
    assert {name: leg["ended"] for name, leg in legs.items()} == {"plan": 6, "search": 6, "write": 6}


def test_branches_call_vllm_at_once_and_outputs_tell_whose_they_are(mount, alone):
    def fork(models):
        calls = [
            models["chat"].call(f"look{at}", ask(lambda job, at=at: job.params["prompts"][at], **SOON), like=LIKE)
            for at in range(4)
        ]
        return Graph("agent", par(*calls))

    expected = {f"look{at}": alone(PROMPTS[at]) for at in range(4)}
    with serve({"chat": mount, "agent": fork}) as service:
        told = list(service.submit(prompts=PROMPTS[:4], model="agent"))
    assert {name: [one["output"].id for one in told if one["call"] == name] for name in expected} == expected


def test_an_agent_that_is_cancelled_in_a_call_leaves_nothing_in_vllm(mount, rig):
    def long(models):
        asked = {"max_tokens": 400, "ignore_eos": True}
        return Graph(
            "agent",
            models["chat"].call("plan", lambda job: {"prompt": PROMPTS[0], **asked}, like={**LIKE, **asked}),
        )

    with serve({"chat": mount, "agent": long}) as service:
        answer = service.submit(model="agent")
        next(iter(answer))
        assert answer.cancel()
        assert len(ids(service(PROMPTS[1], model="chat", **SOON))) == 6
        assert not rig.scheduler.requests


def test_a_tool_that_raises_behind_a_call_of_vllm_fails_its_run_alone(mount, alone):
    def broken(given):
        raise LookupError("no such page")

    with serve({"chat": mount, "agent": lambda models: plan_and_write(models, broken, **SOON)}) as service:
        answer = service.submit(prompt=PROMPTS[0], model="agent")
        with pytest.raises(Exception, match="no such page"):
            answer.result(60)
        assert ids(service(PROMPTS[1], model="chat", **SOON)) == alone(PROMPTS[1])
