"""Preempted texts whose keys and values are kept in the host's memory go on, and compute nothing again."""

from __future__ import annotations

import random

import pytest
import torch
from texts import Drive, alone, made, model_of, prompts
from toys import Flat

import neustream
from neustream import KVCache
from neustream.backends.transformers import TextMount, mount
from neustream.engine.events import Finished
from neustream.errors import BackendError, GraphError

MAX = 12


class Aside(Drive):
    """Preempted jobs keep what they computed; `computed` counts the tokens of all calls."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.computed = 0
        served, forward = self.texts.model, self.texts.model.forward

        def counted(rows):
            self.computed += sum(len(row.tokens) for row in rows)
            return forward(rows)

        served.forward = counted

    def evict(self, job):
        held = self.texts._seats.held.get(job.id)
        there = 0 if held is None else held.cached
        self.texts.put_aside(job.id)
        assert job.id not in self.texts._seats.held
        self.walks[job].preempt()
        job.computed = float(there)


@pytest.mark.parametrize("options", [{}, {"buckets": [32, 64]}], ids=["packed", "buckets"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_go_on_and_each_token_is_computed_once(kind, options):
    model, asked = model_of(kind), prompts(8, seed=3)
    if options:
        drive = Drive(model, **options)
        wanted = drive.finish([drive.job(prompt, MAX) for prompt in asked])
    else:
        wanted = [alone(model, prompt, MAX) for prompt in asked]
    drive = Aside(model, **options)
    for seed, evict in [(1, 0.3), (2, 0.6)]:
        drive.computed = 0
        assert drive.shuffle([drive.job(prompt, MAX) for prompt in asked], seed, None, evict) == wanted
        assert drive.computed == sum(len(prompt) + len(text) - 1 for prompt, text in zip(asked, wanted, strict=True))
    assert drive.shuffle([drive.job(prompt, MAX) for prompt in asked], 3, 5, 0.4) == wanted
    assert not drive.texts._seats._aside and len(drive.texts) == 0


def test_what_comes_back_is_what_was_there_to_the_last_bit():
    drive = Aside(model_of("llama"), slots=3)
    first, other = drive.job(prompts(1)[0], MAX), drive.job([5, 6, 7], MAX)
    drive.step({first: None, other: None})
    cache, seats = drive.texts.model.cache, drive.texts._seats
    held = seats.held[first.id]
    before = [one.clone() for one in cache.read(held.slot, 0, held.cached)]
    drive.evict(first)
    newcomers = [drive.job(prompt, MAX) for prompt in prompts(2, seed=8)]
    drive.step(dict.fromkeys(newcomers))  # another one has its slot
    assert held.slot in {one.slot for one in seats.held.values()}
    drive.evict(newcomers[0])
    seats.bring_back(first.id, 0)
    after = cache.read(seats.held[first.id].slot, 0, held.cached)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_seeded_texts_draw_what_they_would_have_drawn():
    model, draw = model_of("opt"), random.Random(1)
    asked = [{"prompt": prompt, "temperature": 0.9, "seed": draw.randrange(99)} for prompt in prompts(6, seed=5)]
    wanted = [alone(model, max_tokens=MAX, **ask) for ask in asked]
    drive = Aside(model, slots=6)
    assert drive.shuffle([drive.job(max_tokens=MAX, **ask) for ask in asked], 4, None, 0.5) == wanted


def test_who_is_over_leaves_nothing_aside():
    drive = Aside(model_of("llama"), slots=2)
    job = drive.job(prompts(1)[0], MAX)
    drive.step({job: None})
    drive.evict(job)
    assert list(drive.texts._seats._aside) == [job.id]
    drive.texts.release(job.id)
    assert not drive.texts._seats._aside


def served(host, seen):
    """What ten requests get that share memory for few, and how many tokens were computed for them."""
    model, asked = made("llama"), prompts(10, seed=4, low=10, high=40)
    options = {"profile": Flat(), "slots": 6, "kv_cache": KVCache(8, 16, host), "prefix_tokens": 0}
    texts, computed = TextMount(model, **options), [0]
    with neustream.serve(texts, observers=[seen.append], policy=neustream.FCFS()) as service:
        call = texts.model.forward

        def counted(rows):
            computed[0] += sum(len(row.tokens) for row in rows)
            return call(rows)

        texts.model.forward = counted
        answers = [service.submit(prompt, max_tokens=MAX, ignore_eos=True) for prompt in asked]
        got = [list(answer.result(timeout=60).token_ids) for answer in answers]
    assert got == [alone(model, prompt, MAX) for prompt in asked]
    return computed[0] - sum(len(prompt) + MAX - 1 for prompt in asked)


def test_a_service_computes_nothing_again_where_there_is_room_on_the_host():
    plain, kept = [], []
    assert served(0, plain) > 0
    assert served(100, kept) == 0
    steps = [[one.step for one in seen if isinstance(one, Finished)] for seen in (plain, kept)]
    assert sum(len(step.preempted) for step in steps[0]) > 0 == sum(len(step.aside) for step in steps[0])
    lost = [step.preempted for step in steps[1] if step.preempted]
    assert lost and lost == [step.aside for step in steps[1] if step.aside]


def test_models_with_caches_of_their_own_and_too_little_memory_are_refused(monkeypatch):
    cache = KVCache(8, 16, 4)
    with pytest.raises(BackendError, match=r"host_blocks=4, but its requests have caches of their own"):
        neustream.serve(
            TextMount(made("bloom", "eager", n_head=4), profile=Flat(), slots=2, max_len=64, kv_cache=cache)
        )
    monkeypatch.setattr(mount, "free_bytes", lambda: 1000)
    with pytest.raises(BackendError, match=r"host_blocks=4 of kv_cache may take [\d,]+ bytes, 1,000 are free"):
        neustream.serve(TextMount(model_of("llama"), profile=Flat(), slots=2, kv_cache=cache))
    with pytest.raises(GraphError, match="host_blocks must be a whole number of 0 or more, got -1"):
        KVCache(8, 16, -1)
