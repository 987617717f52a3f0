"""Any parameters, of several requests at once: each gets what the stock `generate` gives it alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import CONFIGS, all_ahead, made
from toys import Flat

import neustream
from neustream import KVCache
from neustream.backends.transformers import TextMount
from neustream.backends.transformers.choosing import Penalties
from neustream.backends.transformers.from_config import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
SIZE = len(TOKENIZER)
READABLE = range(ord(" "), ord("~") + 1)
UNREADABLE = [token for token in range(EOS) if token not in READABLE]
NAMES = {"logit_bias": "sequence_bias", "min_tokens": "min_new_tokens", "ignore_eos": None, "processors": None}
"""What `generate` calls parameters; None: it is told otherwise."""
PENALTIES = ("presence_penalty", "frequency_penalty")


class Drawn:
    """A request's own processor: tokens that its latest one points at are likelier."""

    def __init__(self, step):
        self.step = step

    def __repr__(self):
        return f"Drawn({self.step})"

    def __call__(self, ids, scores):
        scores[0, (int(ids[0, -1]) + self.step * ids.shape[1]) % SIZE] += 2.0
        return scores


TOKENS = st.integers(0, SIZE - 1)
BARRED = st.lists(st.integers(0, EOS - 1), min_size=1, max_size=6, unique=True)
FILTERS = {
    "top_k": st.integers(1, 40),
    "top_p": st.floats(0.1, 1),
    "min_p": st.floats(0, 0.3),
    "typical_p": st.floats(0.2, 1),
}
EDITS = {
    "repetition_penalty": st.floats(0.7, 1.8),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "no_repeat_ngram_size": st.integers(1, 3),
    "logit_bias": st.dictionaries(TOKENS, st.floats(-9, 9), min_size=1, max_size=4),
    "suppress_tokens": BARRED,
    "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=3),
    "ignore_eos": st.booleans(),
    "processors": st.lists(st.builds(Drawn, st.integers(1, 9)), min_size=1, max_size=2),
}
DRAWS = {"temperature": st.sampled_from([0.5, 1.0, 1.7]), "seed": st.integers(0, 2**63 - 1)}


@st.composite
def asked(draw):
    """A request: its prompt, how long, by which parameters, how many, what is told; where a stop string is cut from."""
    how = draw(st.fixed_dictionaries({}, optional=EDITS))
    if draw(st.booleans()):
        how |= draw(st.fixed_dictionaries(DRAWS, optional=FILTERS))
    count = draw(st.integers(1, 12))
    cut = None
    if draw(st.integers(0, 2)) == 0:
        cut = draw(st.tuples(st.integers(0, 11), st.integers(1, 4)))
        how["suppress_tokens"] = UNREADABLE
    elif draw(st.booleans()):
        how["min_tokens"] = draw(st.integers(0, count))
    return {
        "prompt": draw(st.lists(st.sampled_from(READABLE), min_size=1, max_size=30)),
        "count": count,
        "how": how,
        "cut": cut,
        "n": draw(st.sampled_from([None, None, None, 1, 2, 3])),
        "logprobs": draw(st.sampled_from([None, None, 0, 3])),
    }


def stock(model, one, number=0, stop=None):
    """What `generate` makes of sequence `number` of a request: its tokens, and the model's own logits behind each."""
    how = {NAMES.get(name, name): value for name, value in one["how"].items() if NAMES.get(name, name)}
    seed, temperature = how.pop("seed", 0), how.get("temperature")
    if temperature is None:
        for name in FILTERS:
            how.pop(name, None)
    if "sequence_bias" in how:
        how["sequence_bias"] = {(token,): bias for token, bias in how["sequence_bias"].items()}
    own = list(one["how"].get("processors", []))
    costs = [how.pop(name, 0.0) for name in PENALTIES]
    if any(costs):
        own.insert(0, Penalties(*costs, len(one["prompt"])))  # `generate` has none
    torch.manual_seed((seed + number) % 2**63)
    ids = torch.tensor([one["prompt"]], device=model.device)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=[_on_a_copy(processor) for processor in own],
        max_new_tokens=one["count"],
        do_sample=temperature is not None,
        eos_token_id=None if one["how"].get("ignore_eos") else EOS,
        pad_token_id=EOS,
        **{"top_k": 0, **how},
        **({} if stop is None else {"stop_strings": [stop], "tokenizer": TOKENIZER}),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences[0, len(one["prompt"]) :].tolist(), found.logits


def _on_a_copy(processor):
    """`generate` tells of the logits that it gives to processors: these are to leave them as they are."""
    return lambda ids, scores: processor(ids, scores.clone())


def stop_of(model, one):
    """A part of what a request's text would be; None: it is to have no stop string, or its text has no such part."""
    if one["cut"] is None:
        return None
    first, length = one["cut"]
    text = TOKENIZER.decode(stock(model, one)[0], skip_special_tokens=True)
    return text[first : first + length] or None


@cache
def model_for(kind):
    return made(kind, vocab_size=SIZE, eos_token_id=EOS).requires_grad_(False)


@pytest.fixture(scope="module", params=CONFIGS)
def served(request):
    """A model, and a service that has memory for two and a half of its four slots; seeded rows draw ahead."""
    model = model_for(request.param)
    mount = TextMount(model, TOKENIZER, profile=Flat(), slots=4, max_len=96, kv_cache=KVCache(30, 8))
    with pytest.MonkeyPatch.context() as patch, neustream.serve({"chat": mount}) as service:
        all_ahead(patch)
        yield model, service


@settings(max_examples=12)
@given(st.lists(asked(), min_size=1, max_size=7))
def test_in_any_company_each_gets_what_generate_gives_alone(served, company):
    model, service = served
    stops = [stop_of(model, one) for one in company]
    answers = [
        service.submit(
            one["prompt"], max_tokens=one["count"], stop=stop, n=one["n"], logprobs=one["logprobs"], **one["how"]
        )
        for one, stop in zip(company, stops, strict=True)
    ]
    for one, stop, answer in zip(company, stops, answers, strict=True):
        found = answer.result(120)
        for number, completion in enumerate([found] if one["n"] is None else found):
            tokens, logits = stock(model, one, number, stop)
            assert list(completion.token_ids) == tokens, (one, stop, number)
            check_told(completion, one["logprobs"], logits)
            if stop is not None and stop in (text := TOKENIZER.decode(tokens, skip_special_tokens=True)):
                assert completion.text == text[: text.index(stop)] and completion.finish_reason == "stop"


def check_told(completion, count, logits):
    """How likely the model found each token, by its own logits."""
    if count is None:
        assert completion.likelihoods is None
        return
    assert len(completion.likelihoods) == len(completion.token_ids)
    for told, token, one in zip(completion.likelihoods, completion.token_ids, logits, strict=True):
        wanted = one[0].float().log_softmax(-1)
        assert told.token == token and told.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
        assert [value for _, value in told.top] == pytest.approx(wanted.topk(count).values.tolist(), abs=1e-4)
        assert all(value == pytest.approx(float(wanted[id]), abs=1e-4) for id, value in told.top)
