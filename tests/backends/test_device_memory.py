"""What is opened on a device asks first what is free there: a stand-in says so on a CPU."""

from __future__ import annotations

import pytest
import torch
from texts import Drive, alone, made, model_of, prompts
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import Flat

import neustream
from neustream.backends import copies
from neustream.backends.torch import free_on
from neustream.backends.transformers import LanguageModel, TextMount, layers, model, prefixes
from neustream.errors import BackendError

LOGITS = 96 * 8
"""Bytes of the logits of a text in a step: as the model gives them, and in float32."""


def test_what_is_free_on_a_gpu_is_asked_once_torch_has_given_back_what_it_keeps(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (1000, 8000))[1])
    assert free_on(torch.device("cuda", 1)) == 1000
    assert asked == ["empty", torch.device("cuda", 1)]
    assert free_on(torch.device("meta")) is None


class Gpu:
    """The memory of a device whose slots take all of theirs at once; `left`: what is free behind these."""

    def __init__(self, monkeypatch):
        self.free = self.left = 10**12
        for module in (layers, model):
            monkeypatch.setattr(module, "grows", lambda device: False)
        for module in (layers, copies):
            monkeypatch.setattr(module, "free_on", lambda device: self.free)
        monkeypatch.setattr(prefixes, "free_on", lambda device: self.left)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def bytes_of_token():
    cache = LanguageModel(model_of("llama"), slots=1).cache
    return cache.token_bytes * len(cache.layers)


def test_a_model_whose_slots_do_not_fit_is_refused_with_what_it_needs_what_is_free_and_what_to_change(gpu):
    slot = 96 * bytes_of_token()
    gpu.free = 4 * slot + 4 * LOGITS
    assert LanguageModel(model_of("llama"), slots=4, graphs=False).cache.slots == 4
    gpu.free -= 1
    why = (
        f"LlamaForCausalLM: no memory for the keys and values of 4 slots of 96 tokens on {model_of('llama').device}; "
        f"give fewer slots or a smaller max_len (they may take {4 * slot:,} bytes, steps {4 * LOGITS:,}, "
        f"and {gpu.free:,} are free: as much as 3 slots take)"
    )
    with pytest.raises(BackendError) as refused:
        LanguageModel(model_of("llama"), slots=4, graphs=False)
    assert str(refused.value) == why
    with pytest.raises(BackendError, match="for the keys and values of 4 slots of 96 tokens"):
        LanguageModel(model_of("llama"), slots=4, kv_tokens=8, graphs=False)  # the scheduler's share changes nothing
    assert LanguageModel(model_of("llama"), slots=4, max_len=64, graphs=False).cache.length == 64


def test_a_model_that_is_opened_again_is_refused_in_the_same_way(gpu):
    mount = TextMount(model_of("llama"), slots=4, profile=Flat(), graphs=False)
    with neustream.serve({"chat": mount}) as service:
        service([5, 6], max_tokens=2)
    gpu.free = 1000
    with pytest.raises(BackendError, match=r"no memory for the keys and values of 4 slots of 96 tokens on .*; give"):
        neustream.serve({"chat": mount})


def test_beginnings_of_texts_are_kept_as_far_as_half_of_what_is_free_has_room(gpu):
    mine, token = made("llama"), bytes_of_token()
    with neustream.serve({"chat": (mount := TextMount(mine, slots=4, profile=Flat(), graphs=False))}):
        assert mount._prefixes.blocks == 4 * 96 // 4 // 16
    gpu.left = 100 * token
    with neustream.serve({"chat": (mount := TextMount(mine, slots=4, profile=Flat(), graphs=False))}):
        assert mount._prefixes.blocks == 50 // 16
    why = rf"prefix_tokens=101 may take {101 * token:,} bytes on .*, where {100 * token:,} are free behind the slots"
    with pytest.raises(BackendError, match=why):
        neustream.serve({"chat": TextMount(mine, slots=4, profile=Flat(), graphs=False, prefix_tokens=101)})


def test_weights_that_do_not_fit_are_not_moved_by_half(gpu):
    mine = made("opt")
    size = sum(weight.nbytes for weight in (*mine.parameters(), *mine.buffers()))
    gpu.free = size - 1
    why = f"OPTForCausalLM has {size:,} bytes of weights to be moved to meta, where {size - 1:,} are free"
    with pytest.raises(BackendError) as refused:
        copies.copies(mine, ["meta"])
    assert str(refused.value) == why
    assert {weight.device for weight in mine.parameters()} == {mine.device}
    gpu.free = size
    assert copies.copies(mine, ["meta"])[0].device.type == "meta"


def test_texts_are_the_same_where_slots_take_all_of_their_memory_at_once(gpu):
    mine, asked = made("llama"), prompts(5, seed=2)
    drive = Drive(mine, slots=3)
    assert not drive.texts.model.cache.grows
    jobs = [drive.job(prompt, 8, ignore_eos=True) for prompt in asked]
    assert drive.shuffle(jobs, seed=1, chunk=9, evict=0.1) == [alone(mine, p, 8, eos_token_id=None) for p in asked]


def test_weights_that_are_there_need_no_memory_whether_or_not_the_device_has_its_number(gpu):
    gpu.free = 0
    copies._check_memory(made("opt").to("meta"), torch.device("meta"), copies.itself)
    with FakeTensorMode():
        there = torch.empty(2, 3, device="cuda:0")
    for name, on in (("cuda", True), ("cuda:0", True), ("cuda:1", False), ("cpu", False)):
        assert copies._is_on(there, torch.device(name)) is on
