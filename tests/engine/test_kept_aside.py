"""What preempted requests have computed is kept by modules that can, and by nobody else without a word."""

from __future__ import annotations

import pytest
from toys import Flat

from neustream import (
    FCFS,
    Graph,
    KVCache,
    Member,
    Pool,
    ProfiledExecutor,
    Scheduler,
    ThreadExecutor,
    serve,
)
from neustream.errors import BackendError
from neustream.graphs import llm, llm_profiles
from neustream.service.graphs import GraphMount

GRAPH = Graph("chat", llm("llm"))
PROFILES = llm_profiles("llm", Flat())
STAGES = ("llm.prefill", "llm.decode")


class Forgets:
    """Counts the tokens that it has of each request, and is asked for the rest of those alone."""

    def __init__(self):
        self.has, self.wrong, self.aside = {}, [], 0

    def load(self, device):
        pass

    def step(self, inputs):
        for given in inputs:
            if given.stage == "llm.prefill" and self.has.get(given.id, 0) != given.computed:
                self.wrong.append((given.id, self.has.get(given.id, 0), given.computed))
            self.has[given.id] = given.computed + given.size
        return [{"token": 5} for _ in inputs]

    def release(self, id):
        self.has.pop(id, None)


class Keeps(Forgets):
    def put_aside(self, id):
        self.aside += 1


class Plain:
    """An executor from before there was `put_aside`."""

    def __init__(self):
        self._executor = ProfiledExecutor()

    def start(self, batch, clock):
        self._executor.start(batch, clock)

    def release(self, id):
        pass

    def close(self, *, wait=True):
        pass


def mount(module, host):
    modules = dict.fromkeys(STAGES, module) | {"llm": module}
    return GraphMount(GRAPH, modules, PROFILES, kv_caches={"llm": KVCache(6, 4, host)})


@pytest.mark.parametrize(("kind", "host"), [(Forgets, 0), (Keeps, 9)])
def test_modules_are_asked_for_the_rest_of_what_they_have(kind, host):
    module = kind()
    with serve(mount(module, host), policy=FCFS()) as service:
        asked = [service.submit({"prompt_tokens": 6, "max_tokens": 10}) for _ in range(6)]
        for answer in asked:
            answer.result(60)
    assert module.wrong == []
    assert (module.aside > 0) == bool(host)
    assert module.has == {}


def test_modules_that_would_forget_it_are_refused_by_name():
    with pytest.raises(BackendError, match=r"model 'llm': host_blocks=9, but Forgets, of stage 'llm.prefill', has"):
        serve(mount(Forgets(), 9), policy=FCFS())


@pytest.mark.parametrize("make", [Plain, lambda: ThreadExecutor({"llm": Forgets()})], ids=["executor", "module"])
def test_members_with_executors_that_would_forget_it_are_refused(make):
    def member(host, executor):
        caches = {"llm": KVCache(6, 4, host)}
        return Member(Scheduler([Pool("gpu", STAGES, kv_caches=caches)], FCFS(), PROFILES), {"gpu": executor})

    executor = make()
    assert member(0, executor).executors == {"gpu": executor}
    with pytest.raises(BackendError, match=r"host_blocks=2, but .* no `put_aside`: give host_blocks=0"):
        member(2, executor)
    executor.close()
    assert member(2, ProfiledExecutor()).executors
