"""What an agent's answer tells while it runs: outputs and the nodes that it is through, in order."""

from __future__ import annotations

import asyncio

from texts import model_of
from toys import Flat

from neustream import Graph, RequestFailed, par, seq, serve, tool
from neustream.backends.transformers import TextMount
from neustream.core.events import LegEnded

LIKE = {"prompt": [5] * 8, "max_tokens": 2}


def agent(models):
    def look(given):
        return {"seen": 1}

    def judge(given):
        if given.params["how"] == "bad":
            raise ValueError("no luck")
        return {}

    say = models["chat"].call("say", lambda job: LIKE, like=LIKE)
    return Graph("agent", seq(say, par(a=tool("look", look), b=tool("peek", look)), tool("judge", judge)))


def test_nodes_and_outputs_come_in_their_order_and_a_node_that_failed_too():
    async def told(answer):
        found = []
        try:
            async for one in answer.happenings():
                found.append((one.leg, one.status) if isinstance(one, LegEnded) else one["call"])
        except RequestFailed as failed:
            found.append(failed.code)
        return found

    with serve({"chat": TextMount(model_of("opt"), profile=Flat(), slots=2), "agent": agent}) as service:
        for how, ends in (("good", [("judge", "done")]), ("bad", [("judge", "failed"), "failed"])):
            answer = service.submit(how=how, model="agent")
            found = asyncio.run(told(answer))
            assert found[:3] == ["say", "say", ("say", "done")] and found[5:] == ends
            assert set(found[3:5]) == {("look", "done"), ("peek", "done")}
            assert found == asyncio.run(told(answer)), "who reads later is told the same"
            assert [leg.leg for leg in answer.legs] == [one[0] for one in found if isinstance(one, tuple)]
        plain = service.submit(LIKE["prompt"], max_tokens=2, model="chat")
        assert plain.result(60) and not plain.legs
