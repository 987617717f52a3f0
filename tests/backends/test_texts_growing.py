"""Slots take memory for the tokens that are in them, and give it back; texts are what they are alone."""

from __future__ import annotations

import mmap
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from places import DEVICE
from texts import Drive, alone, made, model_of, prompts
from toys import Flat

import neustream
from neustream import KVCache
from neustream.backends.transformers import LanguageModel, TextMount, layers
from neustream.backends.transformers.growing import Growing
from neustream.errors import BackendError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or DEVICE.type != "cpu", reason="memory grows in pages of a CPU under Linux only"
)
MAX = 12
PART = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*?^Rss: +(\d+) kB", re.MULTILINE | re.DOTALL)


def resident(cache):
    """Bytes of memory that the system counts for keys and values."""
    places = [storage.data_ptr() for layer in cache.used for storage in (layer.keys, layer.values)]
    parts = [(int(first, 16), int(last, 16), int(size)) for first, last, size in PART.findall(smaps())]
    return sum(size * 1024 for first, last, size in parts if any(first <= place < last for place in places))


def smaps():
    return Path("/proc/self/smaps").read_text()


def long_model():
    """Slots of 4,096 tokens of 8 KiB each."""
    return made("llama", num_key_value_heads=4, hidden_size=256, num_hidden_layers=1, max_position_embeddings=4096)


def test_memory_is_taken_for_tokens_that_are_there_and_given_back():
    drive = Drive(long_model(), slots=8)
    cache = drive.texts.model.cache
    assert cache.grows
    begun, whole = resident(cache), 8 * 4096 * cache.token_bytes
    assert begun < whole // 100  # the trials at the start have given back what they took
    jobs = [drive.job([5] * 1000, 2) for _ in range(2)]
    drive.step(dict.fromkeys(jobs))
    assert cache.nbytes == cache.total * cache.token_bytes == 2000 * cache.token_bytes
    assert 0 <= resident(cache) - begun - cache.nbytes < whole // 100
    drive.finish(jobs)
    assert cache.total <= cache.length  # what nobody has is kept for one slot, at most
    others = [drive.job([5], 40) for _ in range(8)]
    drive.finish(others)
    assert resident(cache) - begun < 1.1 * cache.length * cache.token_bytes


def test_what_nobody_has_is_never_more_than_one_slot_or_what_is_held():
    drive = Drive(model_of("llama"), slots=8)
    cache, draw, most = drive.texts.model.cache, random.Random(3), 0
    jobs = [drive.job(prompt, MAX) for prompt in prompts(24, seed=1, low=20, high=60)]
    while open := [job for job in jobs if job.stage is not None]:
        drive.step(dict.fromkeys(draw.sample(open[:8], min(len(open), 3))))
        held = sum(cache.taken[one.slot] for one in drive.texts._seats.held.values())
        assert cache.total == sum(cache.taken.values())
        assert cache.total - held <= max(held, cache.length)
        most = max(most, cache.total - held)
    assert most > 0  # something is kept


@pytest.mark.parametrize("options", [{}, {"buckets": [32, 64]}], ids=["packed", "buckets"])
def test_slots_take_memory_for_so_many_tokens_at_most(options):
    model = model_of("llama")
    asked = [(prompt, MAX) for prompt in prompts(10, seed=2, low=4, high=40)]
    if not options:
        wanted = [alone(model, *ask) for ask in asked]
    else:
        plain = Drive(model, slots=6, **options)
        wanted = plain.finish([plain.job(*ask) for ask in asked])
    drive = Drive(model, slots=6, kv_tokens=120, **options)
    cache, draw = drive.texts.model.cache, random.Random(5)
    jobs = [drive.job(*ask) for ask in asked]
    lost = 0
    while open := [job for job in jobs if job.stage is not None]:
        chosen, holders, room = [], {job for job in open if job.id in drive.texts._seats.held}, 120
        for job in draw.sample(open, len(open)):
            if job.size <= room and len(chosen) < 6:
                chosen.append(job)
                room -= int(job.size)
        for job in holders - set(chosen):  # as a scheduler does that has so many blocks of one token
            drive.evict(job)
            lost += 1
        drive.step(dict.fromkeys(chosen))
        assert cache.total <= 120
    assert lost > 5
    assert [job.params["tokens"] for job in jobs] == wanted


def test_pages_before_a_place_stay_as_they_are():
    storage = Growing(3, 2, 1000, 24, torch.float32)
    assert not storage.tensor.any()
    storage.tensor.fill_(1.0)
    storage.give_back(1, 500)
    per_page = mmap.PAGESIZE / (24 * 4)
    for head in range(2):
        kept = storage.tensor[1, head]
        assert kept[:500].all()
        assert not kept[500 + int(per_page) + 1 : 1000 - int(per_page) - 1].any()
    storage.give_back(1)
    assert not storage.tensor[1].any()
    assert storage.tensor[0].all() and storage.tensor[2].all()


def test_a_model_whose_slots_may_outgrow_the_memory_is_refused_and_a_smaller_cache_helps(monkeypatch):
    model = model_of("llama")
    one = LanguageModel(model, slots=1).cache
    bytes_of_token = one.token_bytes * len(one.layers)
    monkeypatch.setattr(layers, "free_on", lambda device: 200 * bytes_of_token)
    with pytest.raises(BackendError, match=r"no memory for the keys .* of 4 slots of 96 tokens.* a smaller kv_cache"):
        LanguageModel(model, slots=4)
    assert LanguageModel(model, slots=4, kv_tokens=200).cache.tokens == 200


def test_a_service_with_a_small_cache_takes_no_more_memory_than_that():
    model, asked = made("llama"), prompts(10, seed=4, low=10, high=40)
    wanted = [alone(model, prompt, MAX) for prompt in asked]
    seen = []
    mount = TextMount(model, profile=Flat(), slots=6, kv_cache=KVCache(8, 16), prefix_tokens=0)
    with neustream.serve(mount) as service:
        cache, expect = mount.model.cache, mount._devices[0][1]._seats.expect

        def noted(tokens):
            expect(tokens)
            seen.append(cache.total + tokens)

        mount._devices[0][1]._seats.expect = noted
        answers = [service.submit(prompt, max_tokens=MAX, ignore_eos=True) for prompt in asked]
        got = [list(answer.result(timeout=60).token_ids) for answer in answers]
    assert got == wanted
    assert cache.tokens == 128
    assert max(seen) <= 128
