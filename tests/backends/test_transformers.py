"""Texts on shared slots: each gets the tokens that the stock library makes of it alone."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from texts import CONFIGS, Drive, alone, model_of, prompts

from neustream.backends.transformers import LanguageModel
from neustream.backends.transformers.facts import CACHE_NAMES
from neustream.core.batch import input_of
from neustream.errors import BackendError, StageFailed

MAX = 12


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_equals_generate_in_any_company(kind, attention):
    model = model_of(kind, attention)
    wanted = [alone(model, prompt, MAX) for prompt in prompts(8)]
    assert len({tuple(tokens) for tokens in wanted}) > 4  # they do differ
    drive = Drive(model)
    assert drive.finish([drive.job(prompt, MAX) for prompt in prompts(8)]) == wanted
    for seed, chunk, evict in [(1, None, 0.0), (2, 7, 0.0), (3, 1, 0.0), (4, 5, 0.2), (5, None, 0.1)]:
        assert drive.shuffle([drive.job(p, MAX) for p in prompts(8)], seed, chunk, evict) == wanted
    assert len(drive.texts) == 0


OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_sampled_tokens_equal_generate_with_the_same_seed(kind):
    model = model_of(kind)
    asked = [{"prompt": prompt, "seed": 100 + at, **OPTIONS[at % len(OPTIONS)]} for at, prompt in enumerate(prompts(8))]
    wanted = [alone(model, max_tokens=MAX, **ask) for ask in asked]
    assert wanted != [alone(model, prompt, MAX) for prompt in prompts(8)]
    drive = Drive(model)
    assert drive.finish([drive.job(max_tokens=MAX, **ask) for ask in asked]) == wanted
    for seed, chunk, evict in [(1, 6, 0.0), (2, 5, 0.3)]:
        assert drive.shuffle([drive.job(max_tokens=MAX, **ask) for ask in asked], seed, chunk, evict) == wanted


def test_greedy_and_sampled_share_a_batch_and_streams_without_a_seed_differ():
    drive = Drive(model_of("opt"))
    prompt = prompts(1)[0]
    free = {"temperature": 1.5}
    tokens = drive.finish([drive.job(prompt, MAX), *(drive.job(prompt, MAX, **free) for _ in range(4))])
    assert tokens[0] == alone(model_of("opt"), prompt, MAX)
    assert len({tuple(some) for some in tokens}) == 5


@pytest.mark.parametrize("slots", [1, 3])
def test_jobs_that_find_no_slot_take_one_and_give_it_back(slots):
    model = model_of("llama")
    wanted = [alone(model, prompt, MAX) for prompt in prompts(7)]
    drive = Drive(model, slots=slots)
    assert drive.finish([drive.job(prompt, MAX) for prompt in prompts(7)]) == wanted
    assert drive.shuffle([drive.job(prompt, MAX) for prompt in prompts(7)], 1, chunk=9) == wanted
    assert len(drive.texts) == 0


def test_the_slot_that_was_not_used_for_the_longest_time_goes_first():
    drive = Drive(model_of("opt"), slots=2)
    old, new, third = [drive.job(prompt, MAX) for prompt in prompts(3)]
    for job in (old, new, old, third):
        drive.step({job: None})
    held = [drive.texts.export(input_of(job)) is not None for job in (old, new, third)]
    assert held == [True, False, True]
    drive.texts.release(new.id)
    assert len(drive.texts) == 2


def test_slots_close_up_when_one_between_gets_free():
    model = model_of("gpt2")
    wanted = [alone(model, prompt, MAX) for prompt in prompts(5)]
    drive = Drive(model, slots=5)
    jobs = [drive.job(prompt, MAX) for prompt in prompts(5)]
    drive.step(dict.fromkeys(jobs))
    drive.evict(jobs[1])
    drive.step(dict.fromkeys([jobs[0], *jobs[2:]]))
    assert sorted(held.slot for held in drive.texts._seats.held.values()) == [0, 1, 2, 3]
    drive.step(dict.fromkeys([jobs[0], jobs[3]]))  # slots with others between
    drive.step(dict.fromkeys([jobs[0], jobs[2], jobs[4]]))
    assert drive.finish(jobs) == wanted


def test_a_slot_between_that_somebody_new_gets_in_the_same_step_is_left_to_him(monkeypatch):
    model = model_of("llama")
    asked = prompts(7, seed=2)
    wanted = [alone(model, prompt, MAX) for prompt in asked]
    drive = Drive(model, slots=5)
    jobs = [drive.job(prompt, MAX) for prompt in asked]
    moved, move = [], type(drive.texts.model.cache).move
    monkeypatch.setattr(type(drive.texts.model.cache), "move", lambda *given: (moved.append(given[1:]), move(*given)))
    drive.step(dict.fromkeys(jobs[:5]))
    for gone in (jobs[1], jobs[3]):
        drive.evict(gone)
    drive.step(dict.fromkeys([jobs[0], jobs[2], jobs[4], jobs[5], jobs[6]]))
    assert not moved
    assert sorted(held.slot for held in drive.texts._seats.held.values()) == [0, 1, 2, 3, 4]
    for gone in (jobs[5], jobs[6]):
        drive.evict(gone)
    drive.step(dict.fromkeys([jobs[0], jobs[2], jobs[4], jobs[1]]))  # one of two holes
    assert [places[:2] for places in moved] == [(4, 3)]
    assert drive.finish(jobs) == wanted


def test_eos_and_stop_tokens_end_a_text():
    model = model_of("opt")
    prompt = prompts(1)[0]
    tokens = alone(model, prompt, MAX)
    last = tokens[-1]
    assert len(tokens) == MAX and 2 not in tokens
    first = tokens.index(last) + 1
    drive = Drive(model)
    stopped, free = drive.job(prompt, MAX, stop_token_ids=(last,)), drive.job(prompt, MAX)
    assert drive.finish([stopped, free]) == [tokens[:first], tokens]
    assert stopped.state["ended"] and not free.state["ended"]

    drive.texts.model.eos = frozenset([last])
    patient = {"ignore_eos": True}
    assert drive.finish([drive.job(prompt, MAX), drive.job(prompt, MAX, **patient)]) == [tokens[:first], tokens]


@pytest.mark.parametrize("eos", [7, [7, 11]])
def test_eos_comes_from_the_generation_config(eos):
    model = model_of("gpt2", n_layer=1)
    model.generation_config.eos_token_id = eos
    assert LanguageModel(model, slots=1).eos == frozenset([7, 11] if isinstance(eos, list) else [7])


def test_a_text_may_fill_its_slot():
    model = model_of("gpt2")
    prompt = prompts(1, low=80, high=80)[0]
    drive = Drive(model)
    assert drive.finish([drive.job(prompt, 16)]) == [alone(model, prompt, 16)]


def test_a_second_call_of_a_job_begins_anew():
    model = model_of("opt")
    prompt = prompts(1)[0]
    drive = Drive(model)
    job = drive.job(prompt, MAX)
    drive.finish([job])
    again = drive.job(prompt, MAX)
    again.state = job.state  # as in a loop around the node
    assert drive.finish([again]) == [alone(model, prompt, MAX)]


def test_nan_fails_its_own_job_and_leaves_nothing_behind():
    model = model_of("llama", num_hidden_layers=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    good = [prompt for prompt in prompts(8) if 50 not in prompt][:2]
    wanted = [alone(model, prompt, MAX) for prompt in good]
    drive = Drive(model, slots=2)
    sick, well = drive.job([*range(4, 40), 50, 3], MAX), drive.job(good[0], MAX)
    failed, fine = drive.modules["llm.prefill"].step([input_of(sick), input_of(well)])
    assert isinstance(failed, StageFailed) and "NaN" in str(failed)
    assert fine["token"] == wanted[0][0]
    drive.texts.release(well.id)
    assert drive.finish([drive.job(prompt, MAX) for prompt in good]) == wanted  # one of them in the sick one's slot


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox", "phi"])
def test_other_families(kind):
    model = model_of(kind, intermediate_size=128, num_key_value_heads=2)
    wanted = [alone(model, prompt, MAX) for prompt in prompts(4)]
    drive = Drive(model)
    assert drive.shuffle([drive.job(p, MAX) for p in prompts(4)], 1, chunk=6, evict=0.1) == wanted


def test_half_precision_is_served():
    model = model_of("llama", num_hidden_layers=1).to(torch.bfloat16)
    wanted = [alone(model, prompt, MAX) for prompt in prompts(3)]
    drive = Drive(model)
    assert drive.finish([drive.job(prompt, MAX) for prompt in prompts(3)]) == wanted
    model_of.cache_clear()


def test_models_that_cannot_share_slots_say_why():
    way = LanguageModel(model_of("gpt2", add_cross_attention=True)).way
    assert way.why.startswith("it has an encoder or cross-attention")
    assert LanguageModel(model_of("gpt2")).way.why == ""


def renamed(model, cache):
    """A copy of the model with a forward that knows its cache by another name (None: by no name)."""
    model = copy.deepcopy(model)
    stock = model.forward
    (theirs,) = set(CACHE_NAMES) & set(inspect.signature(stock).parameters)

    def newer(input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        return stock(input_ids, attention_mask, position_ids=position_ids, use_cache=use_cache, **{theirs: cache})

    def older(input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return newer(input_ids, attention_mask, position_ids, past_key_values, use_cache)

    def neither(input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return newer(input_ids, attention_mask, position_ids, None, use_cache)

    model.forward = {"cache": newer, "past_key_values": older, None: neither}[cache]
    return model


@pytest.mark.parametrize("cache", CACHE_NAMES)
def test_the_cache_has_the_name_that_the_models_forward_gives_it(cache):
    wanted = [alone(model_of("llama"), prompt, MAX) for prompt in prompts(3)]
    drive = Drive(renamed(model_of("llama"), cache))
    assert drive.finish([drive.job(prompt, MAX) for prompt in prompts(3)]) == wanted


def test_a_model_that_takes_no_cache_is_refused():
    with pytest.raises(BackendError, match="OPTForCausalLM cannot be served: alone, a call failed with TypeError"):
        LanguageModel(renamed(model_of("opt"), None))


def test_models_in_the_wrong_state_are_refused():
    model = model_of("opt", num_hidden_layers=1, do_layer_norm_before=False)
    with pytest.raises(BackendError, match=r"call model\.eval"):
        LanguageModel(model.train())
    model.eval()
    with pytest.raises(BackendError, match="max_len=97, but OPTForCausalLM has 96 positions"):
        LanguageModel(model, max_len=97)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(BackendError, match="slots must be a whole number"):
            LanguageModel(model, slots=wrong)
    with pytest.raises(BackendError, match="a transformers model that generates"):
        LanguageModel(torch.nn.Linear(2, 2))
    with pytest.raises(BackendError, match=r"no memory for .* 1000000000 slots"):
        LanguageModel(model, slots=10**9)


def test_requests_that_depend_on_each_other_are_computed_one_by_one():
    model = model_of("llama", num_hidden_layers=1, hidden_act="gelu")

    def mean_of_all_tokens(module, inputs, output):
        return output + 0.1 * output.mean((0, 1), keepdim=True)

    model.model.layers[0].mlp.register_forward_hook(mean_of_all_tokens)
    way = LanguageModel(model).way
    assert str(way) == "one by one" and way.why.startswith("in company its logits differ from those alone")
