"""An agent that plans, looks something up and writes, for tests on several engines."""

from __future__ import annotations

from neustream import Graph, seq, tool

SHORT = {"max_tokens": 4}


def ids(text):
    return list(text.token_ids)


def ask(prompt, **asked):
    """The arguments of a call: a prompt that is made of the job, and what else is asked for."""
    return lambda job: {"prompt": prompt(job), **(asked or SHORT)}


async def reverse(given):
    return {"found": ids(given.state["plan"])[::-1]}


def plan_and_write(models, search=reverse, **asked):
    """A call, a tool that reads what it said, and a call that goes on from what the tool found."""
    model, like = models["chat"], {"prompt": [5] * 8, **(asked or SHORT)}
    plan = model.call("plan", ask(lambda job: job.params["prompt"], **asked), like=like)
    write = model.call("write", ask(lambda job: job.state["found"], **asked), like=like)
    return Graph("agent", seq(plan, tool("search", search), write))
