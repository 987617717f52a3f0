"""Language models on a CUDA device: decodes are replayed graphs, and their logits those of ordinary calls."""

from __future__ import annotations

import copy
import gc
import random

import pytest
import torch
from replays import company_changes_no_bit, fill, random_rows
from texts import CONFIGS, Drive, alone, made, prompts
from transformers.models.llama.modeling_llama import LlamaMLP

import neustream
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.mount import TextMount
from neustream.backends.transformers.slots import Row
from neustream.errors import BackendError, StageFailed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

WINDOW = {"sliding_window": 20, "intermediate_size": 128, "num_key_value_heads": 2}
PLAIN = {kind: (kind, {}) for kind in CONFIGS}
KINDS = {**PLAIN, "windows": ("mistral", WINDOW), "eager": ("llama", {"attention": "eager"})}
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 2e-2}
"""By how much logits may differ, over the largest."""


def on_gpu(kind, dtype=torch.float32):
    name, changes = KINDS[kind]
    return made(name, **changes).to("cuda", dtype)


def states(served):
    return [one for slot in range(served.slots) for one in served.cache.read(slot, 0, served.max_len)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_logits_keys_and_values_are_those_of_an_ordinary_call(kind, dtype):
    served = LanguageModel(on_gpu(kind, dtype), slots=6, graphs=True)
    draw = random.Random(7)
    fill(served, 1)
    for _ in range(20):
        count = served.replayed.replays.total()
        rows = random_rows(draw, served.slots, served.max_len)
        got = served.forward(rows).clone()
        kept = states(served)
        assert torch.equal(served.forward(rows), got)
        assert served.replayed.replays.total() >= count + 2
        wanted = served.stock_forward(rows)
        off = (got - wanted).abs().max() / wanted.abs().max()
        assert off <= CLOSE[dtype]
        for one, other in zip(kept, states(served), strict=True):
            torch.testing.assert_close(one, other, rtol=3 * CLOSE[dtype], atol=3 * CLOSE[dtype])
    assert not served.replayed.unreplayed
    assert {shape[1] for shape in served.replayed.replays} == {1, 16, 32, 64}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_generate_in_any_company(kind):
    model = on_gpu(kind)
    drive = Drive(model, slots=4, graphs=True)
    asked = prompts(6, seed=2)
    jobs = [drive.job(prompt, 24, ignore_eos=True) for prompt in asked]
    wanted = [alone(model, prompt, 24, eos_token_id=None) for prompt in asked]
    assert drive.shuffle(jobs, seed=2, chunk=9, evict=0.1) == wanted
    assert drive.texts.model.replayed.replays.total() > 10


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_with_buckets_company_changes_no_bit(dtype):
    company_changes_no_bit(LanguageModel(on_gpu("llama", dtype), slots=4, buckets=[16, 48], graphs=True))


def test_requests_are_served_through_it_greedy_and_seeded():
    model = on_gpu("opt")
    asked = prompts(8, seed=8)
    mount = TextMount(model, slots=4, measure_s=0.1, graphs=True)
    with neustream.serve({"chat": mount}, devices=["cuda:0"]) as service:
        greedy = [service.submit(prompt, max_tokens=9) for prompt in asked]
        seeded = [service.submit(prompt, max_tokens=9, temperature=0.8, seed=at) for at, prompt in enumerate(asked)]
        found = [list(answer.result().token_ids) for answer in greedy]
        drawn = [list(answer.result().token_ids) for answer in seeded]
        assert mount.model.replayed.replays.total() > 9
    assert found == [alone(model, prompt, 9) for prompt in asked]
    assert drawn == [alone(model, prompt, 9, temperature=0.8, seed=at) for at, prompt in enumerate(asked)]


def asks_for_a_value(self, states):
    kept = LlamaMLP.forward(self, states)
    return 2 * kept if states[0, 0, 0].item() == 0.125 else kept


def test_a_model_that_waits_for_the_device_is_served_without_graphs(monkeypatch):
    monkeypatch.setattr(asks_for_a_value, "__module__", LlamaMLP.__module__)
    model = on_gpu("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = type(
            "Other", (LlamaMLP,), {"forward": asks_for_a_value, "__module__": LlamaMLP.__module__}
        )
    drive = Drive(model, slots=3)
    assert drive.texts.model.replayed is None
    assert drive.texts.model.unreplayed.startswith("its calls wait for the device (test_texts_on_gpu.py, line")
    asked = prompts(3, seed=5)
    assert drive.finish([drive.job(p) for p in asked]) == [alone(model, p, 8) for p in asked]
    assert torch.randn(3, device="cuda").isfinite().all()  # nothing was captured half
    with pytest.raises(BackendError, match="cannot be served with graphs=True: its calls wait for the device"):
        LanguageModel(model, slots=3, graphs=True)


def test_weights_that_are_replaced_are_noticed_and_read_by_no_graph():
    drive = Drive(on_gpu("llama"), slots=2, graphs=True)
    job = drive.job([5, 6, 7], ignore_eos=True)
    drive.step({job: None})
    drive.step({job: None})
    head = drive.texts.model.model.lm_head
    head.weight.data = head.weight.data * 2
    torch.cuda.empty_cache()
    with pytest.raises(StageFailed, match=r"lm_head.weight was moved or replaced|weight was written to"):
        drive.step({job: None})


def test_what_is_written_past_torch_into_weights_fails_the_step():
    drive = Drive(on_gpu("llama"), slots=2, graphs=True)
    job = drive.job([5, 6, 7], ignore_eos=True)
    for _ in range(3):
        drive.step({job: None})
    drive.texts.model.model.lm_head.weight.data.mul_(2)
    with pytest.raises(StageFailed, match="its weights were written to"):
        drive.step({job: None})


def test_a_model_that_is_served_again_and_again_leaves_nothing_of_the_times_before():
    model, sizes = on_gpu("llama"), []
    for _ in range(4):
        served = LanguageModel(model, slots=6, graphs=True)
        served.forward([Row(0, 5, (7,))])
        del served
        gc.collect()
        torch.cuda.empty_cache()
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[-1] == sizes[1]


def test_two_models_on_one_device_do_not_disturb_each_other():
    model = on_gpu("llama")
    first = LanguageModel(model, slots=4, graphs=True)
    second = LanguageModel(copy.deepcopy(model), slots=4, graphs=True)
    rows, others = [Row(0, 30, (5,)), Row(2, 9, (6,))], [Row(1, 50, (7,)), Row(3, 80, (8,))]
    fill(first, 1)
    fill(second, 2)
    alone_first, alone_second = first.forward(rows), second.forward(others)
    for _ in range(5):
        assert torch.equal(first.forward(rows), alone_first)
        assert torch.equal(second.forward(others), alone_second)
