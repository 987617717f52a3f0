"""Agents for real: graphs that call a stock language model of the same service, and tools."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from planner import ask, ids, plan_and_write
from texts import alone, model_of, prompts
from toys import Flat

from neustream import SLO, BackendError, Graph, RequestFailed, call, loop, par, seq, serve, tool
from neustream.backends.transformers import TextMount
from neustream.core.events import Emitted
from neustream.errors import NeustreamError
from neustream.service.agents import AgentMount, Asked, Told

LIKE = {"prompt": [5] * 8, "max_tokens": 4}
PROMPT = prompts(1)[0]


def chat(**options):
    return TextMount(model_of("opt"), **{"profile": Flat(), "slots": 2, **options})


def expected(prompt):
    model = model_of("opt")
    found = alone(model, prompt, 4)[::-1]
    return found, alone(model, found, 4)


def test_an_agent_calls_a_model_and_a_tool_and_its_answer_is_the_state():
    with serve({"chat": chat(), "agent": plan_and_write}) as service:
        answers = [service.submit(prompt=prompt, model="agent") for prompt in prompts(6)]
        plain = service.submit(PROMPT, max_tokens=4, model="chat")
        for prompt, answer in zip(prompts(6), answers, strict=True):
            found, written = expected(prompt)
            state = answer.result(60)
            assert state["found"] == found and ids(state["write"]) == written
        assert ids(plain.result(60)) == alone(model_of("opt"), PROMPT, 4)
        assert service.models["chat"].used == 0
    legs = service.report.to_dict()["legs"]
    assert {name: leg["ended"] for name, leg in legs.items()} == {"plan": 6, "search": 6, "write": 6}


def test_outputs_stream_by_call():
    with serve({"chat": chat(), "agent": plan_and_write}) as service:
        told = list(service.submit(prompt=PROMPT, model="agent"))
    assert [one["call"] for one in told] == ["plan"] * 4 + ["write"] * 4


def test_a_call_has_times_of_its_own_and_whether_its_promise_was_kept():
    """The tool in front of `write` alone takes longer than all that `write` is promised."""

    def slow(given):
        threading.Event().wait(0.3)
        return {"found": [7, 8]}

    def build(models):
        model = models["chat"]
        late = model.call("late", ask(lambda job: [7, 8]), like=LIKE, slo=SLO(first=1e-9))
        return Graph("agent", seq(plan_and_write(models, slow).root, late))

    with serve({"chat": chat(), "agent": build}, slo=SLO(first=60.0, finish=True)) as service:
        state = service.submit(prompt=PROMPT, model="agent").result(60)
        plain = service.submit(PROMPT, max_tokens=4, model="chat").result(60)
    for one in (state["plan"], state["write"], plain):
        assert 0 <= one.waited_s < one.ttft_s <= one.at_s[-1] <= one.latency_s
        assert one.on_time and len(one.at_s) == 4 and one.tpot_s > 0
    assert not state["late"].on_time
    leg = service.report.to_dict()["legs"]["write"]
    assert leg["ttft_s"]["mean"] == pytest.approx(state["write"].ttft_s)
    assert leg["tpot_s"]["mean"] == pytest.approx(state["write"].tpot_s)


def test_outputs_are_those_of_the_call_that_made_them_where_one_before_made_none():
    """A branch may be ended before its call has made anything, and the same call of the next round must not be it."""
    asked, made = Asked({}), []

    def call_of(name):
        return SimpleNamespace(reader=lambda: lambda output: made.append(name) or name)

    asked.calls["think", "left"] = [(0, call_of("first")), (3, call_of("second"))]
    told = Told(asked)
    outputs = [Emitted("run", index, {}, 0.0, 0.0, branch="left", leg="think", place=index - 3) for index in (3, 4)]
    assert [told(output)["output"] for output in outputs] == ["second", "second"]
    early = Emitted("run", 1, {}, 0.0, 0.0, branch="left", leg="think", place=0)
    assert Told(asked)(early)["output"] == "first", "whoever reads later reads the same"


def test_more_agents_than_slots_while_they_are_at_their_tools():
    waiting, gate = threading.Semaphore(0), threading.Event()

    def hold(given):
        waiting.release()
        gate.wait()
        return {"found": [7, 8, 9]}

    with serve({"chat": chat(slots=1), "agent": lambda models: plan_and_write(models, hold)}) as service:
        answers = [service.submit(prompt=PROMPT, model="agent") for _ in range(3)]
        for _ in answers:
            assert waiting.acquire(timeout=60), "all of them come to the tool: none keeps its slot there"
        assert service.models["chat"].used == 0
        gate.set()
        assert len({tuple(ids(answer.result(60)["write"])) for answer in answers}) == 1


def test_names_in_the_state_are_the_agents_own():
    """A call may be called as its model is, and a tool may return names that the model's steps have."""
    mine = {"chat": "mine", "token": 7, "ended": True, "cached": 9}

    def count(given):
        return {"rounds": given.state.get("rounds", 0) + 1}

    def build(models):
        def talk(name):
            return models["chat"].call(name, ask(lambda job: job.params["prompt"]), like=LIKE)

        rounds = loop(seq(talk("chat"), tool("count", count)), until=lambda job: job.state["rounds"] == 2)
        return Graph("agent", seq(rounds, tool("note", lambda given: mine), talk("write")))

    with serve({"chat": chat(), "agent": build}) as service:
        state = service.submit(prompt=PROMPT, model="agent").result(60)
        assert service.models["chat"].used == 0
    assert ids(state.pop("write")) == alone(model_of("opt"), PROMPT, 4)
    assert state == {"rounds": 2, **mine}


def test_between_turns_the_memory_of_a_talk_is_kept_and_counted():
    """Each turn's prompt is all that was said so far: what the turns before computed is not computed again."""
    opening = list(range(5, 45))

    def note(given):
        said = [*given.state.get("talk", opening), *ids(given.state["turn"]), 9]
        known = given.state["turn"].cached_tokens
        return {"talk": said, "cached": [*given.state.get("cached", ()), known]}

    def build(models):
        turn = models["chat"].call("turn", ask(lambda job: job.state.get("talk", opening)), like=LIKE)
        rounds = loop(seq(turn, tool("note", note)), until=lambda job: len(job.state["cached"]) == 8)
        return Graph("agent", rounds)

    with serve({"chat": chat(prefix_tokens=512), "agent": build}) as service:
        state = service.submit(model="agent").result(60)
        assert service.models["chat"].used == 0
    with serve({"chat": chat(prefix_tokens=0), "agent": build}) as service:
        anew = service.submit(model="agent").result(60)
    assert state["talk"] == anew["talk"] and anew["cached"] == [0] * 8
    first, *later = state["cached"]
    assert first == 0 and all(known >= 32 for known in later) and later[-1] > later[0]


def test_branches_and_rounds():
    def build(models):
        def turn(name):
            return models["chat"].call(name, ask(lambda job: job.params["prompt"]), like=LIKE)

        def count(given):
            return {"rounds": given.state.get("rounds", 0) + 1}

        both = par(left=turn("a"), right=turn("b"))
        return Graph("agent", loop(seq(both, tool("count", count)), until=lambda job: job.state["rounds"] == 2))

    with serve({"chat": chat(), "agent": build}) as service:
        state = service.submit(prompt=PROMPT, model="agent").result(60)
        assert service.models["chat"].used == 0
    wanted = alone(model_of("opt"), PROMPT, 4)
    assert ids(state["left"]["a"]) == ids(state["right"]["b"]) == wanted


def test_each_call_has_the_service_promise_from_its_own_start():
    """A tool that takes longer than all of what is promised for a call: `write` is late for itself alone."""
    came, gate = threading.Event(), threading.Event()

    def hold(given):
        came.set()
        assert gate.wait(60)
        return {"found": [7, 8]}

    promise = SLO(first=20.0, step=20.0, finish=True)
    with serve({"chat": chat(), "agent": lambda models: plan_and_write(models, hold)}, slo=promise) as service:
        answer = service.submit(prompt=PROMPT, model="agent")
        assert came.wait(60)
        try:
            (job,) = [job for member in service.engine.members for job in member.scheduler.jobs.values()]
            before = job.leg_since
        finally:
            gate.set()
        ended = answer.outcome()
    assert ended.on_time
    legs = service.report.by_leg.legs
    assert [legs[name].on_time for name in ("plan", "write")] == [1, 1]
    assert job.leg_since > before, "the last call counts from its own start, behind the tool"
    assert job.slo.first == 20.0


@pytest.mark.parametrize("at", ["plan", "search", "write"])
def test_cancelled_in_each_node_nothing_is_left(at):
    reached, gate = threading.Event(), threading.Event()

    def hold(given):
        if at == "search":
            reached.set()
            gate.wait()
        return {"found": [7, 8, 9]}

    def build(models):
        def arguments(name, prompt):
            return lambda job: {"prompt": prompt(job), "max_tokens": 60 if name == at else 4}

        model = models["chat"]
        plan = model.call("plan", arguments("plan", lambda job: job.params["prompt"]), like=LIKE)
        write = model.call("write", arguments("write", lambda job: job.state["found"]), like=LIKE)
        return Graph("agent", seq(plan, tool("search", hold), write))

    with serve({"chat": chat(), "agent": build}) as service:
        answer = service.submit(prompt=[5, 6, 7], model="agent")
        if at == "search":
            assert reached.wait(60)
        else:
            next(one for one in answer if one["call"] == at)
        answer.cancel()
        gate.set()
        assert answer.outcome().status == "cancelled"
        assert ids(service.submit(PROMPT, max_tokens=4, model="chat").result(60)) == alone(model_of("opt"), PROMPT, 4)
        assert service.models["chat"].used == 0


def test_a_tool_that_fails_and_arguments_that_the_model_refuses():
    def broken(given):
        raise ValueError("no luck")

    def useless(given):
        return {"found": [10**6]}

    for search, why in ((broken, "stage 'search': ValueError: no luck"), (useless, "1000000 is no token")):
        with serve({"chat": chat(), "agent": lambda models, search=search: plan_and_write(models, search)}) as service:
            with pytest.raises(RequestFailed, match=why):
                service.submit(prompt=PROMPT, model="agent").result(60)
            assert service.models["chat"].used == 0


@pytest.mark.parametrize("given", [None, [5], {1: 2}])
def test_arguments_that_are_no_mapping_by_name_fail_the_request(given):
    def build(models):
        return Graph("agent", models["chat"].call("plan", lambda job: given, like=LIKE))

    with serve({"chat": chat(), "agent": build}) as service:
        with pytest.raises(NeustreamError, match="call 'plan': what arguments returns must be a mapping from names"):
            service.submit(model="agent").result(60)
        assert service.models["chat"].used == 0


def test_what_is_no_agent():
    for build, why in (
        (lambda models: 3, "an agent's graph is a neustream.Graph, got 3"),
        (lambda models: models["sd"], "no model 'sd'; "),
        (lambda models: 1 / 0, "making the graph of agent 'agent' raised ZeroDivisionError"),
        (lambda models: models["chat"].call("x", ask(lambda job: []), like={"prompt": []}), "the prompt is empty"),
        (lambda models: models["chat"].call("x", None, like=LIKE), "call 'x': arguments must be a function"),
        (lambda models: models["chat"].call("x", ask(dict), like=None), "call 'x': like must be a mapping"),
        (lambda models: models["chat"].call("x", ask(dict), like={1: 2}), "call 'x': like must be a mapping"),
    ):
        with pytest.raises(NeustreamError, match=why):
            serve({"chat": chat(), "agent": build})
    with pytest.raises(BackendError, match="an agent is a function that makes its graph, got 3"):
        serve({"chat": chat(), "agent": AgentMount(3)})


def test_a_graph_of_tools_needs_no_modules():
    graph = Graph("tools", seq(tool("one", lambda given: {"one": 1}), tool("two", lambda given: {"two": 2})))
    with serve(graph, {}, {}) as service:
        assert service.submit().result(60) == {"one": 1, "two": 2}
    assert call(graph, "both").call.name == "both"
