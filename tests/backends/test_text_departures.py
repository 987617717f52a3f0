"""A replica that goes: texts under way go on at the others with their keys and values, token for token."""

from __future__ import annotations

import threading

import pytest
import torch
from places import DEVICE
from test_texts import engine
from texts import alone, model_of, prompts

from neustream import EventLog
from neustream.core.kv_cache import KVCache
from neustream.engine.events import Observer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def moved(log: EventLog) -> list[str]:
    """The requests that had steps on two members."""
    places: dict[str, set[str]] = {}
    for step in log.steps:
        for id in step["jobs"]:
            places.setdefault(id, set()).add(step["member"])
    return [id for id, members in places.items() if len(members) == 2]


def served(kind: str, sampling: dict, goes: str, *observers: Observer, **options):
    """Ten texts on two replicas, of which one goes once some of both have their first tokens."""
    log = EventLog()
    with engine(model_of(kind), devices=[str(DEVICE)] * 2, observers=[log, *observers], **options) as running:
        answers = [running.submit(prompt, max_tokens=20, **sampling) for prompt in prompts(10)]
        for answer in answers[:4]:
            next(iter(answer))
        running.engine.remove(goes).result(60)
        assert [member.name for member in running.engine.members] == ["cpu#1" if goes == "cpu#0" else "cpu#0"]
        texts = [answer.result(60).token_ids for answer in answers]
        again = running.submit(prompts(1)[0], max_tokens=20, **sampling).result(60).token_ids
        assert again == texts[0] and running.models[""].used == 0
    return texts, log, running


SAMPLINGS = {"greedy": {}, "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 4}}


@pytest.mark.parametrize(("sampling", "goes"), [("greedy", "cpu#0"), ("sampled", "cpu#1")])
def test_texts_that_move_are_those_of_generate(sampling, goes):
    options = SAMPLINGS[sampling]
    wanted = [tuple(alone(model_of("llama"), prompt, 20, **options)) for prompt in prompts(10)]
    texts, log, _ = served("llama", options, goes, slots=6, policy="fcfs")
    assert texts == wanted and moved(log)


def test_texts_that_find_no_blocks_are_computed_anew():
    wanted = [tuple(alone(model_of("opt"), prompt, 20)) for prompt in prompts(10)]
    texts, log, running = served("opt", {}, "cpu#0", slots=8, policy="fcfs", kv_cache=KVCache(14, 8))
    assert texts == wanted and moved(log)
    assert running.report.counts["on_time"] == 11


def test_a_text_is_streamed_without_a_gap_or_a_repeat_when_it_moves():
    prompt = prompts(1)[0]
    wanted = alone(model_of("llama"), prompt, 60)
    gone = threading.Event()
    with engine(model_of("llama"), devices=[str(DEVICE)] * 2) as running:
        answer, tokens = running.submit(prompt, max_tokens=60), []
        for token in answer:
            tokens.append(token.id)
            if len(tokens) == 3:
                running.engine.remove("cpu#0").add_done_callback(lambda done: gone.set())
        assert gone.wait(30)
    assert tokens == wanted
