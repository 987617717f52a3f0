"""Tools of graphs: how long a try may take, and how often one is made anew."""

from __future__ import annotations

import asyncio
import threading

import pytest
from toys import table

from neustream import (
    Engine,
    Graph,
    GraphError,
    Member,
    Pool,
    RequestError,
    Scheduler,
    ToolExecutor,
    WallClock,
    tool,
)


def outcomes(stage, count=1):
    """How requests of one tool end, called for real."""
    member = Member(
        Scheduler([Pool("tools", (stage.name,), concurrency=4)], {}, {stage.name: table(stage.name, 1.0)}),
        {"tools": ToolExecutor({stage.name: stage.tool})},
    )
    with Engine(member, WallClock()) as engine:
        futures = [engine.submit(Graph("g", stage)) for _ in range(count)]
        return [future.result() for future in futures]


def test_a_plain_function_that_hangs_fails_at_its_timeout_and_its_seat_is_free():
    gate = threading.Event()

    def hang(given):
        gate.wait()
        return {}

    results = outcomes(tool("search", hang, timeout_s=0.01), count=9)
    gate.set()
    assert {result.status for result in results} == {"failed"}
    assert "stage 'search': it did not return within 0.010 s" in results[0].reason


def test_a_coroutine_that_hangs_fails_at_its_timeout_even_if_it_will_not_be_cancelled():
    async def stubborn(given):
        for _ in range(2):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.sleep(0)
                return {}

    [result] = outcomes(tool("search", stubborn, timeout_s=0.01))
    assert result.status == "failed" and "did not return within" in result.reason


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_call_that_fails_is_made_anew_as_often_as_it_may(kind):
    tries = []

    def flaky(given):
        tries.append(given.id)
        if len(tries) < 3:
            raise ValueError("not yet")
        return {"tries": len(tries)}

    async def flaky_too(given):
        return flaky(given)

    function = flaky if kind == "plain" else flaky_too
    [result] = outcomes(tool("search", function, retries=2))
    assert result.unwrap() == {"tries": 3}
    tries.clear()
    [result] = outcomes(tool("search", function, retries=1))
    assert result.status == "failed"
    assert result.reason == "stage 'search': ValueError: not yet (2 tries)"


def test_what_is_no_mapping_is_a_failed_try():
    answers = iter([3, {"found": 1}])
    [result] = outcomes(tool("search", lambda given: next(answers), retries=1))
    assert result.unwrap() == {"found": 1}


def test_a_timeout_counts_for_each_try():
    gate, tries = threading.Event(), []

    def slow_at_first(given):
        tries.append(given)
        if len(tries) == 1:
            gate.wait()
        return {"tries": len(tries)}

    [result] = outcomes(tool("search", slow_at_first, timeout_s=0.05, retries=99))
    gate.set()
    assert result.unwrap()["tries"] >= 2


def test_what_a_tool_may_be():
    for wrong, message in (
        ({"function": 3}, "a tool is a function, got 3"),
        ({"concurrency": 0}, "concurrency must be 1 or more, got 0"),
        ({"retries": -1}, "retries must be 0 or more, got -1"),
        ({"timeout_s": 0}, "timeout_s must be above 0, got 0"),
        ({"expect_s": True}, "expect_s must be above 0, got True"),
    ):
        with pytest.raises(GraphError, match=f"tool 'search': {message}"):
            tool("search", **wrong)
    with pytest.raises(RequestError, match="stage 'search': a tool is a function, got none"):
        ToolExecutor({"search": tool("search").tool})
