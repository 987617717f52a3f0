"""Models of a word a step, and some at fault, for tests of services."""

from __future__ import annotations

from toys import table

from neustream import (
    Decision,
    Graph,
    Stage,
    loop,
    serve,
)

ONE = {"s": table("s", 0.001)}


class Words:
    """Emits a word a step."""

    device = "cpu"

    def load(self, device):
        self.device = device

    def step(self, inputs):
        return [{"word": f"w{given.outputs}", "device": self.device} for given in inputs]


def chat(name="say"):
    stage = Stage(name, max_batch=4, emits=True)
    return Graph(f"chat-{name}", loop(stage, times=lambda job: job.params["words"]))


def chatting(name="say", **options):
    return serve(chat(name), {name: Words()}, {name: table(name, *[0.001] * 4)}, **options)


class Refuse:
    """Drops everything."""

    def decide(self, view):
        return Decision([], drop=dict.fromkeys(view.jobs, "no room today"))


class Fails:
    def load(self, device):
        pass

    def step(self, inputs):
        raise LookupError("no such thing")
