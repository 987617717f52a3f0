"""Storage of slots that is made anew, twice as large, once a text has more tokens: where memory comes in no pages."""

from __future__ import annotations

import logging

import pytest
import torch
from places import DEVICE
from taped import Tapes
from texts import Drive, alone, made, prompts
from toys import Flat

import neustream
from neustream.backends.transformers import TextMount, layers, model, prefixes, replayed, slots
from neustream.backends.transformers.layers import SlotLayer
from neustream.core.batch import input_of
from neustream.errors import StageFailed

LONG = {"max_position_embeddings": 256, "num_key_value_heads": 2}
LENGTHS = (5, 40, 90, 12)
"""Of prompts."""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """A device whose memory comes in no pages; slots have storage for 32 tokens at first."""
    for module in (layers, model):
        monkeypatch.setattr(module, "grows", lambda device: False)
    monkeypatch.setattr(slots, "FIRST", 32)
    monkeypatch.setattr(replayed, "SHORTEST", 16)


@pytest.fixture(params=["calls", "graphs"])
def graphs(request, monkeypatch):
    if request.param == "graphs":
        monkeypatch.setitem(replayed.CAPTURES, DEVICE.type, Tapes)
    else:
        monkeypatch.delitem(replayed.CAPTURES, DEVICE.type, raising=False)
    return request.param == "graphs"


def asked():
    return [prompts(1, seed=at, low=length, high=length)[0] for at, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("options", [{}, {"buckets": [48, 130]}], ids=["", "buckets"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_texts_are_those_of_generate_while_slots_come_to_have_more(kind, graphs, options):
    sizes = LONG if kind == "llama" else {"max_position_embeddings": 256}
    drive = Drive(made(kind, **sizes), slots=3, **options)
    cache, captured = drive.texts.model.cache, drive.texts.model.replayed
    first = 48 if options else 32
    assert cache.room == first and cache.nbytes == 3 * first * cache.token_bytes * len(cache.used)
    assert (captured is not None) is graphs
    rooms, resize = [], cache._resize
    cache._resize = lambda room: (rooms.append(room), resize(room))
    jobs = [drive.job(prompt, 30, ignore_eos=True) for prompt in asked()]
    found = drive.shuffle(jobs, seed=3, chunk=25, evict=0.05)
    assert found == [alone(drive.texts.model.model, prompt, 30, eos_token_id=None) for prompt in asked()]
    assert rooms == sorted(set(rooms)) and rooms[-1] == cache.room < 256
    assert cache.nbytes == 3 * cache.room * cache.token_bytes * len(cache.used)
    if graphs:
        contexts = {keys for _, tokens, keys in captured.replays if tokens == 1}
        assert len(contexts) > 1 and max(contexts) <= cache.room
        assert captured.version == cache.version


@pytest.mark.parametrize("often", [1, 10**6])
def test_who_finds_no_memory_for_more_fails_alone_at_the_second_time(graphs, often, monkeypatch):
    drive = Drive(made("llama", **LONG), slots=3)
    lm, left, resize = drive.texts.model, [often], SlotLayer.resize

    def lacking(layer, room):
        if room > 32 and layer is lm.cache.layers[1] and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("full")
        resize(layer, room)

    monkeypatch.setattr(SlotLayer, "resize", lacking)
    short, long = asked()[0], asked()[1]
    one, other = drive.job(short, 8, ignore_eos=True), drive.job(long, 8, ignore_eos=True)
    found, failed = drive.texts.step([input_of(job, job.size) for job in (one, other)])
    assert found["token"] == alone(lm.model, short, 1)[0]
    if often == 1:
        assert failed["token"] == alone(lm.model, long, 1)[0]
        return
    assert isinstance(failed, StageFailed) and "out of memory" in str(failed)
    again = drive.job(short, 8, ignore_eos=True)
    assert drive.finish([again]) == [alone(lm.model, short, 8, eos_token_id=None)]
    assert lm.cache.room == 32


def test_graphs_that_cannot_be_captured_again_are_calls_from_then_on(monkeypatch, caplog):
    monkeypatch.setitem(replayed.CAPTURES, DEVICE.type, Tapes)
    drive = Drive(made("llama", **LONG), slots=2)
    captured = drive.texts.model.replayed

    def refuse(function):
        raise RuntimeError("not again")

    captured._capture = refuse
    (prompt,) = prompts(1, seed=2, low=25, high=25)
    with caplog.at_level(logging.WARNING, "neustream"):
        assert drive.finish([drive.job(prompt, 30, ignore_eos=True)]) == [
            alone(drive.texts.model.model, prompt, 30, eos_token_id=None)
        ]
    assert "decodes are no CUDA graphs any more" in caplog.text and "not again" in caplog.text
    assert not captured.takes([]) and captured.replays.total() > 0


def test_earlier_texts_leave_room_for_what_slots_may_come_to_have(monkeypatch):
    mine = made("llama", **LONG)
    mount = TextMount(mine, slots=2, profile=Flat())
    free = [0]
    monkeypatch.setattr(prefixes, "free_on", lambda device: free[0])
    for left, blocks in ((0, 0), (64, 2), (10**6, 8)):
        with neustream.serve({"chat": mount}):
            cache = mount.model.cache
            token = cache.token_bytes * len(cache.used)
            assert cache.room == 32 and cache.to_come == 2 * (256 - 32) * token
            free[0] = cache.to_come + left * token
        with neustream.serve({"chat": mount}):
            assert (0 if mount._prefixes is None else mount._prefixes.blocks) == blocks


def test_slots_begin_with_their_shares_of_what_all_may_have():
    model, (prompt,) = made("llama", **LONG), prompts(1, seed=4, low=80, high=80)
    drive = Drive(model, slots=2, kv_tokens=200)
    cache = drive.texts.model.cache
    assert cache.room == cache.first == 100 // slots.ALIGNED * slots.ALIGNED > 80
    version = cache.version
    assert drive.finish([drive.job(prompt, 10, ignore_eos=True)]) == [alone(model, prompt, 10, eos_token_id=None)]
    assert cache.version == version
    assert Drive(model, slots=2, kv_tokens=2 * 256).texts.model.cache.room == 256


def test_what_measuring_took_is_given_back(graphs, tmp_path):
    mount = TextMount(made("llama", **LONG), slots=2, measure_s=0.1, cache=tmp_path)
    with neustream.serve({"chat": mount}) as service:
        captured = mount.model.replayed
        assert mount.model.cache.room == 32 and (captured is not None) is graphs
        if captured is not None:
            assert captured.version == mount.model.cache.version > 1
        (prompt,) = prompts(1, seed=4, low=70, high=70)
        assert list(service(prompt, max_tokens=3).token_ids) == alone(mount.model.model, prompt, 3)
        assert mount.model.cache.room == 128
