"""Packed calls that torch's tracer took down: the stock call's logits to the last bit, or the stock call."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import re
import sys
import weakref

import pytest
import torch
from places import DEVICE
from texts import CONFIGS, Drive, alone, made, model_of, prompts
from transformers.models.llama.modeling_llama import LlamaMLP

from neustream.backends.transformers import packed, recorded
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.recorded import NotRecorded, Recorded
from neustream.backends.transformers.slots import Row
from neustream.errors import StageFailed

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="calls are taken down on a CPU alone")

WIDE = {
    "llama": {"hidden_size": 512, "intermediate_size": 512},
    "gpt2": {"n_embd": 512, "n_layer": 1},
}
"""Models with layers large enough for copies in oneDNN's layout; GPT-2's are transposed."""
MIXTURE = {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
LANES = {
    "decodes": [Row(0, 30, [5]), Row(1, 3, [6]), Row(2, 94, [7]), Row(4, 31, [8])],
    "one decode": [Row(3, 50, [9])],
    "a prompt": [Row(2, 0, list(range(3, 60)))],
    "all": [Row(0, 40, [5]), Row(1, 0, [4, 5, 6]), Row(2, 7, [7, 8]), Row(3, 2, [9])],
}


def assert_alike(served, rows):
    """The recorded call gives what the model's own does, and leaves the same keys and values."""
    wanted = served.stock_forward(rows)
    kept = [served.cache.read(row.slot, row.start, row.end) for row in rows]
    for row in rows:
        served.cache.write(
            row.slot, row.start, [torch.zeros_like(one) for one in served.cache.read(row.slot, row.start, row.end)]
        )
    assert torch.equal(served.forward(rows), wanted)
    for row, states in zip(rows, kept, strict=True):
        for own, stock in zip(served.cache.read(row.slot, row.start, row.end), states, strict=True):
            torch.testing.assert_close(own, stock)


@pytest.mark.parametrize("rows", LANES.values(), ids=LANES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_stock_call(kind, rows):
    served = LanguageModel(model_of(kind), slots=6)
    assert served.recorded is not None, served.unrecorded
    assert_alike(served, rows)


@pytest.mark.parametrize("kind", WIDE)
def test_copies_of_weights_in_another_layout_are_read(kind):
    served = LanguageModel(model_of(kind, **WIDE[kind]), slots=6, prepack=True)
    assert served.recorded is not None, served.unrecorded
    for rows in LANES.values():
        assert_alike(served, rows)


def test_one_slot_is_enough():
    served = LanguageModel(model_of("llama"), slots=1)
    assert served.recorded is not None, served.unrecorded
    assert_alike(served, [Row(0, 95, [7])])


def test_weights_that_are_trained_are_as_they_were():
    model = made("llama")
    assert all(weight.requires_grad for weight in model.parameters())
    before = [id(weight) for weight in model.parameters()]
    assert LanguageModel(model, slots=2).recorded is not None
    assert [id(weight) for weight in model.parameters()] == before
    assert all(weight.requires_grad for weight in model.parameters())


def test_nothing_keeps_a_model_that_is_served_no_more():
    model = made("llama")
    gone = weakref.ref(model.get_input_embeddings().weight)
    served = LanguageModel(model, slots=2)
    assert served.recorded is not None
    del model, served
    gc.collect()
    assert gone() is None


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_model_that_is_served_again_and_again_leaves_nothing_of_the_times_before():
    model = model_of("llama")
    sizes = []
    for _ in range(6):
        served = LanguageModel(model, slots=6)
        assert_alike(served, LANES["all"])
        del served
        sizes.append(resident())
    assert sizes[-1] - sizes[1] < 2**20


def test_hooks_see_each_call_of_the_model():
    model = made("llama")
    drive = Drive(model, slots=3)
    assert drive.texts.model.recorded is not None
    asked = prompts(2, seed=5)
    first, second = (drive.job(prompt) for prompt in asked)
    seen = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    drive.step({first: None, second: None})
    drive.step({first: None, second: None})
    handle.remove()
    assert seen[0] == sum(map(len, asked)) and 2 in seen
    count = len(seen)
    assert drive.finish([first, second]) == [alone(model, prompt, 8) for prompt in asked]
    assert len(seen) == count


def test_a_model_that_was_changed_is_noticed_as_ever():
    drive = Drive(made("llama"), slots=2)
    job = drive.job([5, 6, 7])
    drive.step({job: None})
    with torch.no_grad():
        drive.texts.model.model.lm_head.weight.mul_(2)
    with pytest.raises(StageFailed, match=r"was changed while it is served: .*weight was written to"):
        drive.step({job: None})


class Louder(LlamaMLP):
    """Has code of its own, which may have effects."""

    said = 0

    def forward(self, *args):
        self.said += 1
        return super().forward(*args)


def test_code_of_a_users_own_runs_in_each_step():
    model = made("llama")
    layer = model.model.layers[1].mlp
    layer.__class__ = Louder
    drive = Drive(model, slots=2)
    assert re.fullmatch(r"model.layers.1.mlp has code of its own \(.*Louder\)", drive.texts.model.unrecorded)
    job = drive.job([5, 6, 7], ignore_eos=True)
    said = layer.said
    drive.finish([job])
    assert layer.said == said + 8


def test_a_function_that_a_user_put_into_a_module_is_code_of_his_own():
    model = made("llama")
    model.model.layers[0].self_attn.shape_of = lambda states: states.shape
    assert LanguageModel(model, slots=2).unrecorded == "model.layers.0.self_attn has code of its own (shape_of)"


def test_a_layer_that_becomes_of_another_class_is_noticed():
    drive = Drive(made("llama"), slots=2)
    assert drive.texts.model.recorded is not None
    job = drive.job([5, 6, 7])
    drive.step({job: None})
    drive.texts.model.model.model.layers[1].mlp.__class__ = Louder
    with pytest.raises(StageFailed, match=r"was changed while it is served: model\.layers\.1\.mlp is of another class"):
        drive.step({job: None})


def test_tables_that_somebody_puts_into_the_place_of_others_count():
    served = LanguageModel(made("llama"), slots=6)
    rotary, rows = served.model.model.rotary_emb, LANES["all"]
    before, angles = served.forward(rows), rotary.inv_freq
    rotary.inv_freq = angles * 0.5
    assert not torch.equal(served.forward(rows), before)
    assert_alike(served, rows)
    rotary.inv_freq = angles
    assert torch.equal(served.forward(rows), before)


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, ValueError])
def test_what_fails_in_attention_fails_as_it_is(kind, monkeypatch):
    served = LanguageModel(model_of("llama"), slots=2)
    assert served.recorded is not None

    def failing(*given, **how):
        raise kind("no room for scores")

    with monkeypatch.context() as patch:
        patch.setattr(packed, "sdpa_attention_forward", failing)
        with pytest.raises(kind, match=r"^no room for scores$"):
            served.forward([Row(0, 4, [5])])
    assert_alike(served, [Row(0, 4, [5])])


def test_what_fails_in_what_was_taken_down_says_why_in_torchs_words():
    served = LanguageModel(model_of("llama"), slots=2)
    assert served.recorded is not None
    with pytest.raises(RuntimeError, match=r"^index out of range in self$"):
        served.forward([Row(0, 4, [96])])


def test_what_depends_on_values_is_left_to_the_model():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    served = LanguageModel(made("llama", rope_parameters=rope), slots=3, max_len=90)
    assert served.recorded is None
    assert re.match("torch's tracer says of modeling_rope_utils.py, line [0-9]+: Conv", served.unrecorded)


def asks_whether_a_value_is_there(self, states):
    kept = LlamaMLP.forward(self, states)
    return 2 * kept if 0.125 in states[0, :, 0] else kept


def goes_by_pieces_of_32_tokens(self, states):
    return torch.cat([LlamaMLP.forward(self, piece) for piece in states.split(32, 1)], 1)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (asks_whether_a_value_is_there, "torch's tracer says of _tensor.py, line [0-9]+: Converting"),
        (goes_by_pieces_of_32_tokens, "a call of another size failed: RuntimeError: Expected 1 elements"),
    ],
)
def test_code_that_goes_by_values_or_pieces_is_left_to_the_model(code, why, monkeypatch):
    monkeypatch.setattr(code, "__module__", LlamaMLP.__module__)
    model = made("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = type("Other", (LlamaMLP,), {"forward": code, "__module__": code.__module__})
    served = LanguageModel(model, slots=4)
    assert re.match(why, served.unrecorded)
    assert_alike(served, [Row(0, 0, list(range(3, 80))), Row(1, 4, [5])])


def test_experts_are_exact_whether_or_not_they_are_taken_down():
    model = model_of("mixtral", **MIXTURE)
    drive = Drive(model, slots=3)
    assert (drive.texts.model.recorded is None) == bool(drive.texts.model.unrecorded)
    asked = prompts(4, seed=2)
    jobs = [drive.job(prompt, 8, ignore_eos=True) for prompt in asked]
    assert drive.shuffle(jobs, seed=1, chunk=9) == [alone(model, prompt, 8, eos_token_id=None) for prompt in asked]


@pytest.mark.parametrize(("what", "why"), [("attention", "its rows are not"), ("forward", "has a forward of its own")])
def test_others_say_why_they_are_not(what, why):
    model = made("llama", "eager" if what == "attention" else "sdpa")
    if what == "forward":
        layer = model.model.layers[0].mlp
        layer.forward = type(layer).forward.__get__(layer)
    assert why in LanguageModel(model, slots=2).unrecorded


def behind(monkeypatch, change):
    """Have all that is taken down from now on give `change` of what it computes."""
    traced = recorded._traced

    def changed(function, given, sites):
        found = traced(function, given, sites)
        return lambda *inputs: change(found(*inputs))

    monkeypatch.setattr(recorded, "_traced", changed)


def test_other_logits_are_refused(monkeypatch):
    served = LanguageModel(model_of("llama"), slots=2)
    behind(monkeypatch, lambda logits: logits + 1e-3)
    with (
        torch.inference_mode(),
        pytest.raises(NotRecorded, match="logits of 1 rows are others than those of the stock call"),
    ):
        Recorded(served)


def test_what_is_taken_down_twice_is_computed_once_whatever_its_size(monkeypatch):
    graphs, made = [], torch._C._create_function_from_graph
    monkeypatch.setattr(
        torch._C, "_create_function_from_graph", lambda name, graph: (graphs.append(graph), made(name, graph))[1]
    )

    def function(states):
        half = states.shape[-1] // 2
        return states[..., : states.shape[-1] // 2] * 2 + states[..., :half] * 2

    taken = recorded._traced(function, [torch.ones(1, 3, 8)], [])
    for shape in ((1, 3, 8), (2, 5, 6)):
        states = torch.rand(shape)
        assert torch.equal(taken(states), function(states))
    kinds = [node.kind() for node in graphs[0].nodes()]
    assert kinds.count("aten::mul") == kinds.count("aten::floor_divide") == 1


def test_an_attention_that_nobody_reads_is_not_left_out(monkeypatch):
    sites = []

    def function(states):
        sites.append(recorded._Site(None, None, {}))
        torch.ops.neustream.attend(states, states, states, 0)
        return states + 1

    class Stand:
        def update(self, layer, key, value):
            pass

        def attend(self, module, query, key, value):
            return query.clone(), None

    monkeypatch.setattr(recorded._here, "call", Stand())
    monkeypatch.setattr(recorded._here, "sites", sites)
    with pytest.raises(NotRecorded, match="of 1 attentions 1 are asked for nothing"):
        recorded._traced(function, [torch.ones(1, 1, 3, 8)], sites)


def test_what_only_goes_on_with_its_own_size_is_left_to_the_model(monkeypatch):
    behind(monkeypatch, lambda logits: logits.view(3, 96))
    served = LanguageModel(model_of("llama"), slots=4)
    assert served.recorded is None and served.unrecorded.startswith("a call of another size failed: RuntimeError")


def test_a_copy_of_a_model_is_taken_down_by_itself():
    model = made("llama")
    first, second = LanguageModel(model, slots=2), LanguageModel(copy.deepcopy(model), slots=2)
    with torch.no_grad():
        for weight in second.model.parameters():
            weight.mul_(0.5)
    rows = [Row(0, 4, [5]), Row(1, 9, [6])]
    assert not torch.equal(first.forward(rows), second.forward(rows))
    assert_alike(first, rows)
    assert_alike(second, rows)
