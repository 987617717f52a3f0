"""Prompts that begin alike: what they share is computed once, and tokens are those of `generate` alone."""

from __future__ import annotations

import random

import pytest
import torch
from texts import CONFIGS, VOCABULARY, alone, made, model_of
from toys import Flat

import neustream as ns
from neustream import BackendError
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.prefixes import Prefixes
from neustream.backends.transformers.slots import Row
from neustream.backends.transformers.text import Ask, Text

HOW = {"max_tokens": 6, "ignore_eos": True}


def words(count, seed=0):
    draw = random.Random(seed)
    return [draw.randrange(3, VOCABULARY) for _ in range(count)]


def computed(model, service, prompt):
    """The tokens that prefills of one request computed, and its completion."""
    widths = []

    def count(module, args, kwargs):
        if kwargs["use_cache"]:
            widths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    done = service(prompt, **HOW)
    handle.remove()
    return widths[0], done


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_system_prompt_is_computed_once(kind):
    model, system = made(kind), words(37)
    with ns.serve(model, profile=Flat(), slots=2) as service:
        for at, (tail, cached) in enumerate([(5, 0), (9, 32), (1, 32)]):
            prompt = system + words(tail, seed=at + 1)
            width, done = computed(model, service, prompt)
            assert (width, done.cached_tokens) == (len(prompt) - cached, cached)
            assert list(done.token_ids) == alone(model, prompt, 6, eos_token_id=None)


def test_the_next_turn_of_a_conversation_goes_on_behind_the_answer():
    model, first = made("llama"), words(20)
    with ns.serve(model, profile=Flat(), slots=2) as service:
        answer = service(first, max_tokens=14, ignore_eos=True)
        second = [*first, *answer.token_ids, *words(4, seed=1)]
        width, done = computed(model, service, second)
    assert (width, done.cached_tokens) == (len(second) - 32, 32)
    assert list(done.token_ids) == alone(model, second, 6, eos_token_id=None)


def test_the_same_prompt_again_has_its_last_token_computed():
    model, prompt = made("llama"), words(32)
    with ns.serve(model, profile=Flat(), slots=2) as service:
        first = service(prompt, **HOW)
        again = service(prompt, **HOW)
    assert (first.cached_tokens, again.cached_tokens) == (0, 16)
    assert again.token_ids == first.token_ids


def test_with_buckets_shared_tokens_are_the_same_to_the_last_bit():
    model, prompt = made("llama").to(torch.bfloat16), words(50)
    with ns.serve(model, profile=Flat(), slots=2, buckets=[64]) as service:
        first, again = (service(prompt, **HOW, logprobs=3) for _ in range(2))
    assert (first.cached_tokens, again.cached_tokens) == (0, 32)
    assert again.token_ids == first.token_ids and again.likelihoods == first.likelihoods


def test_prompts_that_are_told_of_are_computed_as_a_whole():
    with ns.serve(made("llama"), profile=Flat(), slots=2) as service:
        scores = [service(words(40), **HOW, prompt_logprobs=1) for _ in range(2)]
    assert [done.cached_tokens for done in scores] == [0, 0]
    assert all(len(done.scores) == 39 for done in scores)


def test_no_prefixes_where_none_are_wanted():
    with ns.serve(made("llama"), profile=Flat(), slots=2, prefix_tokens=0) as service:
        assert [service(words(40), **HOW).cached_tokens for _ in range(2)] == [0, 0]
    with pytest.raises(BackendError, match="prefix_tokens"):
        ns.serve(made("llama"), profile=Flat(), prefix_tokens=-1)


def test_a_model_that_was_changed_meanwhile_leaves_nothing_of_it_behind():
    model, prompt = made("llama"), words(40)
    wanted = alone(model, prompt, 6, eos_token_id=None)
    weight = model.model.layers[0].mlp.down_proj.weight

    def spoil(module, args):
        weight.data.mul_(1.5)

    with ns.serve(model, profile=Flat(), slots=2) as service:
        before = weight.detach().clone()
        handle = model.model.layers[0].register_forward_pre_hook(spoil)
        assert service.submit(prompt, **HOW).exception(60) is not None
        handle.remove()
        weight.data.copy_(before)
        done = service(prompt, **HOW)
    assert (list(done.token_ids), done.cached_tokens) == (wanted, 0)


def test_the_least_recently_used_go_first_and_never_what_others_lie_behind():
    served = LanguageModel(model_of("llama"), slots=2)
    kept = Prefixes(served, served.cache, 4 * 16)

    def keep(tokens):
        served.forward([Row(0, 0, tokens)])
        kept.keep(0, Text(Ask(tokens)), len(tokens))

    system, one, two = words(16), words(16, seed=1), words(16, seed=2)
    keep([*system, *one])
    keep([*system, *two])
    assert [kept.match(Ask([*system, *tail, 3])) for tail in (one, two)] == [32, 32]
    other = words(32, seed=3)
    keep(other)  # room for one block is left: `one` goes for the other
    assert len(kept) == 64
    assert [kept.match(Ask([*tokens, 3])) for tokens in ([*system, *one], [*system, *two], other)] == [16, 32, 32]
    assert kept.match(Ask(words(40, seed=4))) == 0


def test_any_texts_in_any_order_are_found_as_they_were_computed():
    served = LanguageModel(model_of("llama"), slots=2)
    kept, draw = Prefixes(served, served.cache, 6 * 16), random.Random(0)
    for _ in range(40):
        tokens = words(16, seed=draw.randrange(2)) + words(32, seed=draw.randrange(3)) + words(7, seed=9)
        found = kept.fill(1, Ask(tokens), draw.choice([16, 32, 48, 55]))
        served.forward([Row(0, 0, tokens)])
        for ours, theirs in zip(served.cache.read(1, 0, found), served.cache.read(0, 0, found), strict=True):
            torch.testing.assert_close(ours, theirs)
        kept.keep(0, Text(Ask(tokens)), len(tokens))
        assert len(kept) <= 96
