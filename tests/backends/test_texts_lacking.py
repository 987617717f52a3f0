"""Steps that find no memory: calls are made smaller, and texts stay what they are alone."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from texts import Drive, alone, made, prompts
from toys import Flat

import neustream
from neustream.backends.transformers import TextMount, lacking, prefixes
from neustream.backends.transformers.prefixes import Prefixes
from neustream.core.batch import input_of
from neustream.errors import StageFailed

KINDS = {
    "in slots": ("llama", {}),
    "in lanes": ("llama", {"attention": "eager"}),
    "side by side": ("bloom", {"attention": "eager", "n_layer": 2, "n_head": 4, "hidden_size": 64}),
    "states": ("mamba", {"attention": "eager", "state_size": 4, "hidden_size": 32}),
}


class Memory:
    """Lets a model's last layer find no memory, once the model is served: its others have written by then.

    Args:
        fails: whether a call does, by its number and its tokens.
    """

    def __init__(self, model, fails):
        self.on, self.calls, self.failed, self._fails = False, 0, 0, fails
        layers = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
        layers[-1].register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        if not self.on:
            return
        states = args[0] if args else kwargs["hidden_states"]
        self.calls += 1
        if self._fails(self.calls, states.shape[0] * states.shape[1]):
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def driven(kind, fails, **options):
    name, changes = KINDS[kind]
    model = made(name, **changes)
    memory = Memory(model, fails)
    drive = Drive(model, slots=6, **options)
    memory.on = True
    return model, memory, drive


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seeded", [False, True], ids=["greedy", "seeded"])
def test_texts_are_those_of_generate_whatever_calls_find_no_memory(kind, seeded):
    every = 3 if kind in ("in slots", "in lanes") else 71  # a cache of its own is computed anew as a whole
    model, memory, drive = driven(kind, lambda call, tokens: call % every == 2)
    asked = prompts(7, seed=3)
    own = [{"seed": at, "temperature": 0.8} if seeded else {} for at in range(7)]
    jobs = [drive.job(prompt, 9, ignore_eos=True, **one) for prompt, one in zip(asked, own, strict=True)]
    found = drive.shuffle(jobs, seed=5, chunk=9, evict=0.1)
    assert memory.failed > (4 if every == 3 else 0)
    memory.on = False
    assert found == [alone(model, p, 9, eos_token_id=None, **one) for p, one in zip(asked, own, strict=True)]


@pytest.mark.parametrize("kind", ["in slots", "in lanes"])
def test_calls_have_as_many_tokens_as_fit_from_then_on(kind, caplog, monkeypatch):
    monkeypatch.setattr(lacking, "PATIENCE", 6)
    model, memory, drive = driven(kind, lambda call, tokens: tokens > 20)
    asked = prompts(4, seed=1, low=40, high=40)
    jobs = [drive.job(prompt, 30, ignore_eos=True) for prompt in asked]
    with caplog.at_level(logging.WARNING, "neustream"):
        drive.step(dict.fromkeys(jobs))
    assert re.search(r"no memory for a call of \d+ tokens .*; calls have at most \d+ for now", caplog.text)
    failed = memory.failed
    others = [drive.job(prompt, 30, ignore_eos=True) for prompt in asked[:2]]
    drive.step(dict.fromkeys(others))
    assert memory.failed == failed
    found = drive.finish([*jobs, *others])
    memory.on = False
    wanted = [alone(model, prompt, 30, eos_token_id=None) for prompt in asked]
    assert found == [*wanted, *wanted[:2]]
    assert drive.texts._lacking.most is None  # decodes find enough


def test_a_large_call_of_long_ago_does_not_keep_later_ones_small(monkeypatch):
    monkeypatch.setattr(lacking, "PATIENCE", 2)
    calls = lacking.Lacking("a model")

    def steps():
        count = 0
        while calls.most is not None:
            calls.step()
            count += 1
        return count

    calls.found_none(8, "full")
    alone = steps()
    calls.found_none(2048, "full")
    steps()
    calls.found_none(8, "full")
    assert calls.most == 4 and steps() == alone > 0


def test_a_request_that_never_fits_fails_alone():
    model, _, drive = driven("in slots", lambda call, tokens: False)
    fine, never = drive.job([5, 6, 7], 8), drive.job([8, 9], 8)
    forward = drive.texts.model.forward

    def lacking_for_one(rows):
        if any(row.tokens[-1] == 9 for row in rows):
            raise torch.OutOfMemoryError("no room for 2 tokens")
        return forward(rows)

    drive.texts.model.forward = lacking_for_one
    given = [input_of(job, job.size) for job in (fine, never)]
    one, other = drive.texts.step(given)
    assert one["token"] == alone(model, [5, 6, 7], 1)[0]
    assert isinstance(other, StageFailed)
    assert str(other) == "stage 'llm': out of memory: OutOfMemoryError: no room for 2 tokens"
    assert len(drive.texts) == 1


def test_requests_that_are_served_keep_their_promises(caplog):
    model = made("opt")
    memory = Memory(model, lambda call, tokens: call % 4 == 0)
    asked = prompts(10, seed=8)
    with neustream.serve({"chat": TextMount(model, slots=4, profile=Flat())}) as service:
        memory.on = True
        done = [answer.result(timeout=60) for answer in [service.submit(p, max_tokens=9) for p in asked]]
        memory.on = False
        assert service.report.counts["on_time"] == 10
    assert memory.failed > 5
    assert [list(one.token_ids) for one in done] == [alone(model, p, 9) for p in asked]


def beginning_alike(count):
    return [[*range(3, 40), *prompt] for prompt in prompts(count, seed=6, low=4, high=9)]


@pytest.mark.parametrize("where", ["_copy", "fill"])
def test_what_cannot_be_kept_of_earlier_texts_is_kept_for_nobody(where, monkeypatch):
    model = made("llama")
    asked = beginning_alike(4)
    mount = TextMount(model, slots=2, profile=Flat())
    with neustream.serve({"chat": mount}) as service:
        if where == "fill":
            assert service(asked[0], max_tokens=4).cached_tokens == 0

        def none(self, *args):
            raise torch.OutOfMemoryError("full")

        name = {"_copy": Prefixes, "fill": type(mount.model.cache)}[where]
        with monkeypatch.context() as patched:
            patched.setattr(name, {"_copy": "_copy", "fill": "write"}[where], none)
            first = service(asked[1], max_tokens=4)
        assert first.cached_tokens == 0
        done = [service(prompt, max_tokens=4) for prompt in asked]
        assert {one.cached_tokens for one in done[1:]} == ({0} if where == "_copy" else {32})
    wanted = [alone(model, prompt, 4) for prompt in asked]
    assert [list(one.token_ids) for one in [first, *done]] == [wanted[1], *wanted]


@pytest.mark.parametrize(("free", "again"), [(None, 48), (10**12, 48), (2 * 32 * 1024, 32), (0, 0)])
def test_earlier_texts_that_were_given_up_are_kept_again_when_there_is_memory(free, again, monkeypatch, caplog):
    monkeypatch.setattr(prefixes, "PATIENCE", 3)
    monkeypatch.setattr(prefixes, "free_on", lambda device: free)
    model = made("llama", num_key_value_heads=2, head_dim=32)  # a token takes 1,024 bytes
    most = [30, 10, 10]
    memory = Memory(model, lambda call, tokens: tokens > most[0])
    prompt, long = list(range(3, 59)), [*range(9, 73)]
    mount = TextMount(model, slots=2, profile=Flat(), prefix_tokens=48)

    def cached(prompt=prompt):
        return service(prompt, max_tokens=2).cached_tokens  # two steps

    with neustream.serve({"chat": mount}) as service, caplog.at_level(logging.INFO, "neustream"):
        assert mount.model.cache.token_bytes * 2 == 1024
        assert [cached(), cached()] == [0, 48]
        waits = []
        for _ in range(2):
            memory.on = True
            cached(long)
            memory.on = False
            seen = [cached() for _ in range(8)]
            assert seen[0] == 0 and seen[-1] == again
            waits.append(seen.count(0))
            most.pop(0)
        assert waits == [8, 8] if not again else waits[0] < waits[1]
    assert ("are kept again" in caplog.text) == bool(again)


def test_what_cannot_be_put_aside_or_brought_back_is_computed_again(monkeypatch):
    model = made("llama")
    asked = prompts(3, seed=4, low=10, high=20)
    drive = Drive(model, slots=3)
    jobs = [drive.job(prompt, 8, ignore_eos=True) for prompt in asked]
    drive.step(dict.fromkeys(jobs))
    drive.step(dict.fromkeys(jobs))

    def none(self, *args):
        raise torch.OutOfMemoryError("full")

    cache = drive.texts.model.cache
    with monkeypatch.context() as patched:
        patched.setattr(type(cache), "read", none)
        drive.texts.put_aside(jobs[0].id)
    drive.texts.put_aside(jobs[1].id)
    for job in jobs[:2]:
        drive.walks[job].preempt()
    assert len(drive.texts) == 1
    with monkeypatch.context() as patched:
        patched.setattr(type(cache), "write", none)
        drive.step(dict.fromkeys(jobs[:2]))
    assert drive.finish(jobs) == [alone(model, prompt, 8, eos_token_id=None) for prompt in asked]
