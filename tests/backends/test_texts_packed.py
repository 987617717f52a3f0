"""One forward call a step: prompts and decodes one behind the other, while others use the model as ever."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from places import DEVICE
from replays import fill
from texts import CONFIGS, Drive, alone, made, model_of, prompts

from neustream.backends.transformers import packed
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.packed import OWN
from neustream.backends.transformers.slots import Row


def counted(model):
    """The tokens of each forward call from now on, and what removes the count."""
    widths = []

    def count(module, args, kwargs):
        if kwargs["use_cache"]:  # it is also called to see whether this hook changes anything
            widths.append(tuple(kwargs["input_ids"].shape))

    return widths, model.register_forward_pre_hook(count, with_kwargs=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_prompts_parts_and_decodes_of_a_step_are_one_call(kind):
    model = made(kind)
    drive = Drive(model, slots=6)
    asked = prompts(4, seed=3, low=12)
    first, second, third, fourth = (drive.job(prompt) for prompt in asked)
    drive.step({first: None, second: None, third: 5})
    widths, handle = counted(model)
    drive.step({first: None, second: None, third: 4, fourth: None})
    handle.remove()
    assert widths == [(1, 2 + 4 + len(asked[3]))]
    assert drive.finish([first, second, third, fourth]) == [alone(model, prompt, 8) for prompt in asked]


def test_neighbours_of_similar_length_attend_together_and_others_apart():
    served = LanguageModel(model_of("llama"), slots=6)
    rows = [Row(slot, start, [5]) for slot, start in enumerate((30, 31, 32, 60, 3, 70))]
    together = served.forward(rows)
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(served.forward([row])[0], logits, rtol=1e-4, atol=1e-4)


def test_keys_that_are_read_through_first_are_the_same(monkeypatch):
    rows = [Row(slot, start, [5]) for slot, start in enumerate((30, 31, 60, 3))]
    monkeypatch.setattr(packed, "CACHED_BYTES", 0)
    monkeypatch.setattr(packed, "STREAMED_BYTES", range(1 << 30))
    served = LanguageModel(model_of("llama"), slots=6)
    assert packed.is_cold(served.model)
    call = packed.Packed(rows, served.device, served.cache.token_bytes, 96, cold=True)
    assert all(part.streamed for part in call.parts)
    through = served.forward(rows)
    monkeypatch.setattr(packed, "STREAMED_BYTES", range(0))
    assert torch.equal(served.forward(rows), through)
    assert not any(part.streamed for part in packed.Packed(rows, served.device, served.cache.token_bytes, 96).parts)


def test_masks_have_a_multiple_of_keys_as_far_as_slots_have_them():
    keys = packed._Keys(torch.tensor([7, 30, 93]), 95, 8, None)
    mask, context = keys.mask(0, 2, 31)
    assert context == 32 and mask.sum(-1).tolist() == [8, 31]
    mask, context = keys.mask(2, 3, 94)
    assert context == 95 and mask.sum(-1).tolist() == [94]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="masks are what attention adds on a CPU alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_that_attention_adds_to_its_scores_give_the_same_bits_as_others(dtype, monkeypatch):
    served = LanguageModel(copy.deepcopy(model_of("llama")).to(dtype), slots=6)
    rows = [Row(slot, start, [5]) for slot, start in enumerate((30, 31, 60, 3))] + [Row(4, 20, [6, 7, 8])]
    fill(served, 1)
    masks = [part.mask for part in served.packed(rows).parts]
    assert {mask.dtype for mask in masks} == {dtype}
    added = served.forward(rows)
    monkeypatch.setattr(type(served.cache), "dtype", None)
    assert {part.mask.dtype for part in served.packed(rows).parts} == {torch.bool}
    assert torch.equal(served.forward(rows), added)


def test_a_model_that_attends_in_its_own_way_gets_lanes():
    assert LanguageModel(model_of("llama"), slots=3).packs
    assert not LanguageModel(model_of("llama", attention="eager"), slots=3).packs
    own = made("llama")
    for layer in own.model.layers:
        layer.self_attn.config = copy.deepcopy(own.config)
    served = LanguageModel(own, slots=3)
    assert not served.packs
    assert served.together({"a": Row(0, 5, [3]), "b": Row(1, 0, [3, 4, 5])}) == [["b"], ["a"]]
    again = LanguageModel(own, slots=3, proof=served.unchanged)
    assert again.unchanged is served.unchanged and not again.packs


def test_a_model_that_was_proved_has_room_before_its_first_step():
    model = model_of("llama")
    served = LanguageModel(model, slots=3)
    again = LanguageModel(model, slots=3, proof=served.unchanged)
    assert again.cache.token_bytes == served.cache.token_bytes > 0
    row = Row(1, 0, [3, 4, 5])
    torch.testing.assert_close(again.forward([row]), served.forward([row]))


def test_another_thread_that_uses_the_model_meanwhile_gets_what_it_gets_alone():
    model = made("llama")
    drive = Drive(model, slots=2)
    wanted = alone(model, [5, 6, 7], 6)
    batch = torch.tensor([[1, 1, 5, 6, 7], [3, 4, 5, 6, 7]])
    seen = (batch != 1).long()
    padded = model(batch, attention_mask=seen).logits[:, -1]
    found = {}

    def elsewhere():
        found["implementation"] = model.config._attn_implementation
        found["alone"] = alone(model, [5, 6, 7], 6)
        found["padded"] = model(batch, attention_mask=seen).logits[:, -1]

    def meanwhile(module, args):
        handle.remove()
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()

    handle = model.model.layers[0].register_forward_pre_hook(meanwhile)
    job, beside = drive.job([9, 8, 7]), drive.job([4, 5])
    drive.step({job: None, beside: None})
    assert found["implementation"] == OWN and model.config._attn_implementation == "sdpa"
    assert found["alone"] == wanted
    torch.testing.assert_close(found["padded"], padded)
    assert drive.finish([job, beside]) == [alone(model, prompt, 8) for prompt in ([9, 8, 7], [4, 5])]
