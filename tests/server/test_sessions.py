"""Calls of one agent, made by an orchestrator elsewhere, under one promise."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

pytest.importorskip("torch", reason="needs the extra 'llm'")

from serving import serving, stock, text_service  # noqa: E402

from neustream.server.config import SessionConfig  # noqa: E402
from neustream.server.errors import HTTPError  # noqa: E402
from neustream.server.sessions import AHEAD, BUDGET, LEFT, NAME, Sessions  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MINUTE = {BUDGET: "60000"}
SHORT_S = 3.0


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def opened(most=3, forget_s=10.0):
    clock = Clock()
    return clock, Sessions(SessionConfig(max_open=most, forget_s=forget_s), clock)


def share(sessions, key="", **headers):
    warnings = []
    names = {"name": NAME, "budget": BUDGET, "ahead": AHEAD}
    found = sessions.share(key, {names[each]: value for each, value in headers.items()}, warnings)
    return found, warnings


# -- what a call has ------------------------------------------------------------------------------


def test_later_calls_have_what_is_left():
    clock, sessions = opened()
    first, _ = share(sessions, name="a", budget="10000")
    clock.now += 4
    second, _ = share(sessions, name="a", budget="10000")  # a client's default headers, on each call
    assert (first.total_s, second.total_s) == (10.0, 6.0)
    assert first.first and not second.first
    clock.now += 1
    assert second.left_ms() == pytest.approx(5000)


def test_time_that_a_call_saved_goes_to_those_behind_it():
    clock, sessions = opened()
    one, _ = share(sessions, name="a", budget="9000", ahead="2")
    clock.now += 1  # of 3
    two, _ = share(sessions, name="a", ahead="1")
    clock.now += 1  # of 4
    three, _ = share(sessions, name="a")
    assert (one.total_s, two.total_s, three.total_s) == (3.0, 4.0, 7.0)


def test_a_session_that_is_over():
    clock, sessions = opened()
    share(sessions, name="a", budget="1000")
    clock.now += 1.5
    with pytest.raises(HTTPError, match="the 1000 ms of this session were over 500 ms ago") as late:
        share(sessions, name="a")
    assert (late.value.status, late.value.code) == (504, "late")
    clock.now += 10  # forgotten: the name may be used again
    assert share(sessions, name="a", budget="1000")[0].first


def test_callers_with_other_keys_have_other_sessions():
    clock, sessions = opened(most=2)
    share(sessions, "mine", name="a", budget="1000")
    clock.now += 2
    assert share(sessions, "theirs", name="a", budget="5000")[0].total_s == 5.0
    share(sessions, "mine", name="b", budget="1000")
    with pytest.raises(HTTPError, match="2 sessions are open, at most 2") as full:
        share(sessions, "mine", name="c", budget="1000")
    assert full.value.status == 429 and full.value.retry_after_s == 10.0
    assert share(sessions, "theirs", name="c", budget="1000")[0] is not None


def test_a_session_of_a_day_keeps_none_behind_it():
    clock, sessions = opened(most=3)
    share(sessions, name="day", budget="86400000")
    for turn in range(50):
        share(sessions, name=f"a{turn}", budget="1000")
        clock.now += 6
        share(sessions, name=f"a{turn - 1}")  # is over, but for a warning
        clock.now += 6
    assert len(sessions) <= 3 and share(sessions, name="day")[0].total_s == 86400.0 - 600.0


def test_a_session_that_is_over_is_no_new_one_while_calls_of_it_come():
    """Who goes on too long would have another budget, and not know it."""
    clock, sessions = opened()
    share(sessions, name="a", budget="1000")
    for _ in range(5):
        clock.now += 9.0
        with pytest.raises(HTTPError, match="of this session were over"):
            share(sessions, name="a", budget="1000")
    clock.now += 10.0
    assert share(sessions, name="a", budget="1000")[0].first


@pytest.mark.parametrize(
    ("headers", "warning"),
    [
        ({"name": "a"}, f"{NAME}: not open, and no {BUDGET} that opens it"),
        ({"name": "a b", "budget": "1000"}, f"{NAME}: not 1 to 128 letters"),
        ({"name": "a" * 129, "budget": "1000"}, f"{NAME}: not 1 to 128 letters"),
        ({"name": "a", "budget": "soon"}, f"{BUDGET}: not milliseconds above 0 and up to a day"),
        ({"name": "a", "budget": "0"}, f"{BUDGET}: not milliseconds above 0 and up to a day"),
        ({"name": "a", "budget": "nan"}, f"{BUDGET}: not milliseconds above 0 and up to a day"),
        ({"name": "a", "budget": "86400001"}, f"{BUDGET}: not milliseconds above 0 and up to a day"),
    ],
)
def test_headers_that_are_wrong_are_not_taken(headers, warning):
    _, sessions = opened()
    found, warnings = share(sessions, **headers)
    assert found is None and len(sessions) == 0
    assert len(warnings) == 1 and warnings[0].startswith(warning)


@pytest.mark.parametrize("ahead", ["-1", "1.5", "many", "10001"])
def test_a_wrong_number_of_calls_ahead_is_none(ahead):
    _, sessions = opened()
    found, warnings = share(sessions, name="a", budget="1000", ahead=ahead)
    assert found.total_s == 1.0 and warnings == [f"{AHEAD}: not a whole number from 0 to 10000"]


@settings(deadline=None)
@given(
    budget=st.floats(1.0, 1e6),
    calls=st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 20)), min_size=1, max_size=20),
)
def test_shares_never_go_beyond_the_session(budget, calls):
    """Each call may take all of its share: the next one still has time, as long as calls are ahead."""
    clock, sessions = opened()
    due = clock.now + budget / 1e3
    for used, ahead in calls:
        found, _ = share(sessions, name="a", budget=f"{budget:.6f}", ahead=str(ahead))
        assert 0 < found.total_s <= due - clock.now + 1e-6
        clock.now += used * found.total_s
        if clock.now >= due - 1e-3:
            return


# -- over HTTP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url():
    model = stock()
    with serving(lambda metrics: text_service(model, metrics)) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        yield url


def ask(url, headers, **more):
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 4, **more}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)


def e2e(answer):
    return float(re.search(r"e2e=([0-9.e+]+)", answer.headers["x-neustream-slo"])[1])


def test_calls_of_a_session_are_told_what_is_left(url):
    first = ask(url, {NAME: "one", AHEAD: "1", **MINUTE})
    second = ask(url, {NAME: "one", "x-slo-e2e-ms": "20000"})
    third = ask(url, {NAME: "one"})
    assert e2e(first) == pytest.approx(30000) and e2e(second) == 20000
    lefts = [float(answer.headers[LEFT]) for answer in (first, second, third)]
    assert 60000 > lefts[0] > lefts[1] > lefts[2] > 0
    assert lefts[1] >= e2e(third) >= lefts[2]


def test_a_call_that_earlier_ones_left_no_time_for_is_late(url):
    small = {NAME: "two", BUDGET: "0.01"}
    never = ask(url, small)  # nobody could
    later = ask(url, small)
    other = ask(url, {})
    assert (never.status_code, never.json()["error"]["code"]) == (400, "unattainable")
    assert (later.status_code, later.json()["error"]["code"]) == (504, "late")
    assert other.status_code == 200 and LEFT not in other.headers


def test_a_session_by_langgraph(url):
    """A stock LangGraph program whose nodes ask our chats: its calls share one budget."""
    pytest.importorskip("langgraph", reason="needs the extra 'dev'")
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra 'dev'")
    from langgraph.graph import END, START, MessagesState, StateGraph

    chat = langchain_openai.ChatOpenAI(
        model="tiny",
        base_url=f"{url}/v1",
        api_key="x",
        max_tokens=4,
        max_retries=0,
        include_response_headers=True,
        default_headers={NAME: "agent-1", **MINUTE, "x-slo-ttft-ms": "30000"},
    )

    def plan(state):
        return {"messages": [chat.invoke(state["messages"])]}

    def write(state):
        return {"messages": [chat.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("plan", plan)
    graph.add_node("write", write)
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "write")
    graph.add_edge("write", END)
    messages = graph.compile().invoke({"messages": [("user", "a plan, please")]})["messages"]
    told = [message.response_metadata["headers"] for message in messages[1:]]
    assert len(told) == 2 and all(float(each[LEFT]) < 60000 for each in told)
    assert float(told[0][LEFT]) > float(told[1][LEFT]) > 0
    assert all("ttft=30000" in each["x-neustream-slo"] for each in told)


def test_several_orchestrators_at_once_and_one_whose_budget_ends_in_the_middle(url):
    """Stock LangGraph programs with sessions of their own: one is stopped by its budget, the others go on."""
    pytest.importorskip("langgraph", reason="needs the extra 'dev'")
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra 'dev'")
    openai = pytest.importorskip("openai", reason="needs the extra 'dev'")
    from langgraph.graph import END, START, MessagesState, StateGraph

    def program(name, budget_ms, pause):
        chat = langchain_openai.ChatOpenAI(
            model="tiny",
            base_url=f"{url}/v1",
            api_key="x",
            max_tokens=2,
            max_retries=0,
            include_response_headers=True,
            default_headers={NAME: name, BUDGET: str(budget_ms)},
        )
        graph = StateGraph(MessagesState)

        def turn(state):
            if len(state["messages"]) == 3:
                pause()
            return {"messages": [chat.invoke(state["messages"])]}

        graph.add_node("turn", turn)
        graph.add_edge(START, "turn")
        graph.add_conditional_edges("turn", lambda state: END if len(state["messages"]) == 4 else "turn")
        return graph.compile()

    def run(number):
        def pause():
            if number == 0:
                time.sleep(SHORT_S)

        budget = SHORT_S * 1000 if number == 0 else 60_000
        try:
            messages = program(f"several-{number}", budget, pause).invoke({"messages": [("user", "a plan")]})[
                "messages"
            ]
        except openai.APIStatusError as error:
            return error.status_code, error.body["code"]
        return [float(message.response_metadata["headers"][LEFT]) for message in messages[1:]]

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(run, range(4))
    assert first == (504, "late")
    for left in others:
        assert len(left) == 3 and 60_000 > left[0] > left[1] > left[2] > 0
    assert ask(url, {NAME: "several-0"}).status_code == 504, "its session is not another's"
    assert ask(url, {NAME: "several-1"}).status_code == 200
