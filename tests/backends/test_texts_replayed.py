"""Decodes of fixed shape, as CUDA graphs are captured of them: here by operations done again in the same memory."""

from __future__ import annotations

import copy
import gc
import logging
import random
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DEVICE
from replays import company_changes_no_bit, fill, random_rows
from taped import Tapes
from texts import CONFIGS, Drive, alone, made, model_of, prompts

import neustream
from neustream.backends.transformers import replayed
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.mount import TextMount
from neustream.backends.transformers.slots import Row
from neustream.errors import BackendError

WINDOW = {"sliding_window": 20, "intermediate_size": 128, "num_key_value_heads": 2}
MIXED = {**WINDOW, "num_hidden_layers": 4, "head_dim": 16, "use_bidirectional_attention": None}
KINDS = {
    **{kind: (kind, {}) for kind in CONFIGS},
    "windows": ("mistral", WINDOW),
    "some windows": ("gemma3_text", MIXED),
}
"""Model types, and arguments of their configs."""


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Graphs of a CPU."""
    monkeypatch.setitem(replayed.CAPTURES, DEVICE.type, Tapes)


def served_of(kind, slots=6, **options):
    name, changes = KINDS[kind]
    return LanguageModel(model_of(name, **changes), slots=slots, **options)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**20))
def test_logits_keys_and_values_are_those_of_an_ordinary_call(kind, seed):
    served = SERVED.setdefault(kind, served_of(kind))
    assert served.replayed is not None, served.unreplayed
    draw = random.Random(seed)
    with torch.inference_mode():
        fill(served, seed)
        for _ in range(3):
            rows = random_rows(draw, served.slots, served.max_len)
            before = [served.cache.read(slot, 0, served.max_len) for slot in range(served.slots)]
            wanted = served.stock_forward(rows)
            after = [served.cache.read(slot, 0, served.max_len) for slot in range(served.slots)]
            for slot, states in enumerate(before):
                served.cache.write(slot, 0, states)
            count = served.replayed.replays.total()
            torch.testing.assert_close(served.forward(rows), wanted, rtol=1e-4, atol=1e-4)
            assert served.replayed.replays.total() > count
            for slot, states in enumerate(after):
                torch.testing.assert_close(served.cache.read(slot, 0, served.max_len), states, rtol=1e-4, atol=1e-4)


SERVED = {}
"""Models that are served once for all cases."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_texts_are_those_of_generate_in_any_company(kind, seed):
    name, changes = KINDS[kind]
    model = model_of(name, **changes)
    drive = Drive(model, slots=4)
    asked = prompts(6, seed)
    jobs = [drive.job(prompt, 24, ignore_eos=True) for prompt in asked]
    wanted = [alone(model, prompt, 24, eos_token_id=None) for prompt in asked]
    assert drive.shuffle(jobs, seed, chunk=9, evict=0.1) == wanted
    assert drive.texts.model.replayed.replays.total() > 10


def test_a_step_of_decodes_is_one_replay_of_the_smallest_shape_with_room():
    drive = Drive(model_of("llama"), slots=6)
    counts = drive.texts.model.replayed.replays
    jobs = [drive.job(prompt, 80, ignore_eos=True) for prompt in prompts(3, seed=4, low=8, high=8)]
    drive.step(dict.fromkeys(jobs))
    assert not counts  # more than two prompts are one ordinary call
    for _ in range(60):
        drive.step(dict.fromkeys(jobs))
    assert counts == {(6, 1, 64): 1, (4, 1, 64): 55, (4, 1, 96): 4}  # the first use is a larger one's


def test_shapes_that_are_not_there_are_captured_at_their_second_use(caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "neustream"):
        drive = Drive(model_of("llama"), slots=6)
    replays = drive.texts.model.replayed
    assert [*replays.later] == [(4, 1, 64), (2, 1, 64), (1, 1, 64)]
    assert re.fullmatch(r"LlamaForCausalLM: 8 CUDA graphs in \d+\.\d s, 3 once they are used", caplog.messages[-1])
    jobs = [drive.job(prompt, 80, ignore_eos=True) for prompt in prompts(4, seed=4, low=8, high=8)]
    drive.step(dict.fromkeys(jobs))
    captures, capture = [], replays._capture

    def fails_for_two(function):
        captures.append(len(function.args[1].positions))
        if captures[-1] == 2:
            raise torch.OutOfMemoryError("full")
        return capture(function)

    monkeypatch.setattr(replays, "_capture", fails_for_two)
    for some in (4, 4, 2, 2, 2, 1, 1):
        drive.step(dict.fromkeys(jobs[:some]))
    assert captures == [4, 2, 1] and not replays.later
    assert replays.replays == {(6, 1, 64): 1, (4, 1, 64): 1, (2, 1, 96): 3, (1, 1, 96): 1, (1, 1, 64): 1}
    assert "there is no CUDA graph of shape (2, 1, 64): a capture failed: OutOfMemoryError: full" in caplog.text
    assert drive.finish(jobs) == [
        alone(drive.texts.model.model, job.params["ask"].prompt, 80, eos_token_id=None) for job in jobs
    ]


def test_short_prompts_are_replayed_beside_decodes_and_others_are_not():
    model = model_of("llama")
    drive = Drive(model, slots=6)
    counts = drive.texts.model.replayed.replays
    asked = [*prompts(3, seed=4, low=20, high=20), *prompts(1, seed=5, low=70, high=70)]
    jobs = [drive.job(prompt, 9, ignore_eos=True) for prompt in asked]
    drive.step({jobs[0]: None})
    assert counts == {(1, 32, 32): 1}
    drive.step({jobs[0]: None, jobs[1]: None, jobs[2]: None})
    assert counts == {(1, 32, 32): 3, (1, 1, 96): 1}
    drive.step({jobs[0]: None, jobs[3]: None})  # longer than any graph
    assert counts.total() == 4
    wanted = [alone(model, prompt, 9, eos_token_id=None) for prompt in asked]
    assert drive.finish(jobs) == wanted


def test_models_whose_prompts_cannot_be_captured_have_graphs_of_decodes(monkeypatch, caplog):
    def fails(model, call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replayed, "_prompt_logits", fails)
    monkeypatch.setitem(replayed.CAPTURES, DEVICE.type, lambda device: lambda function: (function(), function)[1])
    with caplog.at_level(logging.WARNING, "neustream"):
        served = LanguageModel(model_of("llama"), slots=2)
    why = "a capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert served.replayed.unreplayed == why
    assert caplog.messages == [f"LlamaForCausalLM: prompts are no CUDA graphs, and take longer: {why}"]
    served.forward([Row(0, 0, (5, 6, 7))])
    assert not served.replayed.replays
    served.forward([Row(0, 3, (8,))])
    assert served.replayed.replays == {(1, 1, 96): 1}


def test_who_is_left_moves_where_fewer_lanes_are_enough():
    model = model_of("llama")
    drive = Drive(model, slots=6)
    asked = prompts(5, seed=5)
    jobs = [drive.job(prompt, count, ignore_eos=True) for prompt, count in zip(asked, (2, 2, 2, 2, 9), strict=True)]
    tokens = drive.finish(jobs)
    assert tokens == [alone(model, p, n, eos_token_id=None) for p, n in zip(asked, (2, 2, 2, 2, 9), strict=True)]
    assert {lanes for lanes, _, _ in drive.texts.model.replayed.replays} == {6, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_buckets_each_length_is_one_graph_and_company_changes_no_bit(dtype):
    served = LanguageModel(copy.deepcopy(model_of("llama")).to(dtype), slots=4, buckets=[16, 48])
    assert served.replayed is not None, served.unreplayed
    company_changes_no_bit(served)


def test_requests_are_served_through_it():
    model = model_of("opt")
    asked = prompts(6, seed=8)
    mount = TextMount(model, slots=4, measure_s=0.1, graphs=True)
    with neustream.serve({"chat": mount}) as service:
        answers = [service.submit(prompt, max_tokens=9) for prompt in asked]
        done = [list(answer.result().token_ids) for answer in answers]
        assert mount.model.replayed.replays
    assert done == [alone(model, prompt, 9) for prompt in asked]


def test_hooks_see_each_call_of_the_model():
    model = made("llama")
    served = LanguageModel(model, slots=2)
    rows, seen = [Row(0, 4, (5,)), Row(1, 9, (6,))], []
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, given: seen.append(1))
    served.forward(rows)
    assert seen == [1] and not served.replayed.replays
    handle.remove()
    served.forward(rows)
    assert seen == [1] and served.replayed.replays == {(2, 1, 64): 1}


def test_tables_that_somebody_puts_into_the_place_of_others_count():
    served = LanguageModel(made("llama"), slots=3)
    rotary, rows = served.model.model.rotary_emb, [Row(0, 40, (5,)), Row(2, 20, (6,))]
    fill(served, 1)
    before = served.forward(rows)
    rotary.inv_freq = rotary.inv_freq * 0.5
    assert not torch.allclose(served.forward(rows), before)
    assert served.replayed.replays.total() == 1


class Louder(torch.nn.Linear):
    """Has code of its own, which may have effects."""


def test_models_that_cannot_be_say_why_and_are_served_all_the_same(caplog):
    model = made("llama")
    model.lm_head.__class__ = Louder
    why = r"LlamaForCausalLM cannot be served with graphs=True: lm_head has code of its own .*Louder\), which no graph"
    with pytest.raises(BackendError, match=why):
        LanguageModel(model, slots=2, graphs=True)
    with caplog.at_level(logging.WARNING, "neustream"):
        served = LanguageModel(model, slots=2)
    assert served.replayed is None and served.unreplayed.startswith("lm_head has code of its own")
    assert caplog.messages == [f"LlamaForCausalLM: decodes are no CUDA graphs, and take longer: {served.unreplayed}"]
    assert torch.equal(served.forward([Row(0, 0, (5, 6))]), served.stock_forward([Row(0, 0, (5, 6))]))


def hooked():
    model = made("llama")
    model.lm_head.register_forward_hook(lambda module, given, output: None)
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: model_of("mamba", "eager", state_size=4, hidden_size=32), "its requests have caches of their own"),
        (hooked, "its modules have hooks, which no graph calls"),
    ],
)
def test_others_say_why_they_are_not(model, why):
    served = LanguageModel(model(), slots=2, max_len=48)
    assert served.replayed is None and served.unreplayed == why


def other_logits(function):
    return lambda: function() * 1.01


def failing(function):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("capture", "why"),
    [
        (other_logits, "logits of a graph of 2 lanes and 96 keys differ from its own by 1.0e-02 of the largest"),
        (failing, "a capture failed: RuntimeError: operation not permitted when stream is capturing"),
    ],
)
def test_captures_that_fail_or_give_something_else_are_not_used(capture, why, monkeypatch):
    monkeypatch.setitem(replayed.CAPTURES, DEVICE.type, lambda device: capture)
    served = LanguageModel(model_of("llama"), slots=2)
    assert served.replayed is None and served.unreplayed == why


def with_old_tokens(function):
    given = vars(function.args[1])
    given |= {name: one.clone() for name, one in given.items() if isinstance(one, torch.Tensor)}
    return function


def test_graphs_that_compute_with_what_was_there_at_the_capture_are_not_used(monkeypatch):
    monkeypatch.setitem(replayed.CAPTURES, DEVICE.type, lambda device: with_old_tokens)
    served = LanguageModel(model_of("llama"), slots=2)
    assert served.replayed is None and served.unreplayed.startswith("logits of a graph of 2 lanes and 96 keys differ")


def test_the_memory_of_slots_is_free_as_soon_as_nobody_has_the_model():
    served = LanguageModel(model_of("llama"), slots=2)
    served.forward([Row(0, 3, (8,))])
    gone = weakref.ref(served.cache.used[0].keys)
    gc.collect()
    gc.disable()
    try:
        del served
        assert gone() is None  # without the collector: that of another service is wanted at once
    finally:
        gc.enable()


def test_graphs_false_has_none_and_no_room_for_them():
    served = LanguageModel(model_of("llama"), slots=2, graphs=False)
    assert served.replayed is None and served.unreplayed == "graphs=False"
    assert served.cache.used[0].keys.shape[2] == 96


def test_on_a_cpu_there_are_none(monkeypatch):
    monkeypatch.delitem(replayed.CAPTURES, "cpu", raising=False)
    model = made("llama").cpu()
    served = LanguageModel(model, slots=2)
    assert served.replayed is None and served.unreplayed == "it is on cpu"
    assert served.cache.used[0].keys.shape[2] == 96
    with pytest.raises(BackendError, match="graphs=True, but the model is on cpu: CUDA graphs are for CUDA devices"):
        LanguageModel(model, slots=2, graphs=True)
    with pytest.raises(BackendError, match="graphs must be True, False or None, got 'yes'"):
        TextMount(model_of("llama"), graphs="yes")
