"""What a model's `generation_config` says is done as the stock `generate` does it."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from test_texts import engine
from texts import IDS, VOCABULARY, made, prompts

from neustream import BackendError, RequestError
from neustream.backends.transformers.said import DRAWS, EDITS

MAX = 9
BART = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "d_model": 64}


def encoder_and_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**sizes, **IDS, decoder_start_token_id=1)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.shared.weight.mul_(3)
    return model


MODELS = {
    "opt": lambda: made("opt"),
    "bart": lambda: made("bart", **BART, is_decoder=True, is_encoder_decoder=False),
    "t5": encoder_and_decoder,
}


def sayings(draw):
    """A random set of settings."""
    some = draw.sample(range(3, VOCABULARY), 6)
    every = {
        "sequence_bias": [[[some[0]], draw.uniform(-9, 9)], [some[1:3], 50.0]],
        "encoder_repetition_penalty": draw.uniform(0.7, 1.6),
        "encoder_no_repeat_ngram_size": draw.randint(1, 3),
        "min_length": draw.randint(1, 45),
        "forced_bos_token_id": some[3],
        "forced_eos_token_id": draw.choice([2, some[4:]]),
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": (draw.randint(1, MAX), 1.5),
        "top_h": draw.uniform(0.3, 1),
        "epsilon_cutoff": draw.uniform(0.001, 0.1),
        "eta_cutoff": draw.uniform(0.001, 0.1),
        "renormalize_logits": True,
        "begin_suppress_tokens": some[:3],
    }
    assert set(every) == {*EDITS, *DRAWS, "begin_suppress_tokens"}
    return {name: every[name] for name in draw.sample(list(every), draw.randint(2, 7))}


def stock(model, prompt, **how):
    """What `generate` makes of a prompt alone: the new tokens, from the first to the one that ends it."""
    torch.manual_seed(how.pop("seed", 0))
    draws = {"do_sample": True, "top_k": 0, **how} if how else {"do_sample": False}
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX, **draws)
    return out[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_any_settings_give_what_generate_gives_alone(kind, seed):
    draw = random.Random(seed)
    model, said = MODELS[kind](), sayings(draw)
    for name, value in said.items():
        setattr(model.generation_config, name, value)
    hows = [{}, {"temperature": 1.3, "seed": seed}, {}, {"temperature": 0.7, "seed": seed + 1}]
    asked = [*prompts(len(hows) - 1, seed=seed), [5]]
    wanted = [stock(model, prompt, **how) for prompt, how in zip(asked, hows, strict=True)]
    with engine(model, slots=3, max_len=64) as service:
        answers = [service.submit(prompt, max_tokens=MAX, **how) for prompt, how in zip(asked, hows, strict=True)]
        found = [list(answer.result(60).token_ids) for answer in answers]
    assert found == wanted, said


def test_what_it_says_ends_a_text_where_it_says():
    model = made("bart", **BART, is_decoder=True, is_encoder_decoder=False)
    assert model.generation_config.forced_eos_token_id == 2  # as the family comes
    with engine(model, slots=2, max_len=64) as service:
        done = service(prompts(1)[0], max_tokens=4, min_tokens=4)
    assert done.token_ids[-1] == 2 and len(done.token_ids) == 4 and done.finish_reason == "stop"


def summarizer(**said):
    """An encoder and a decoder with 24 positions each."""
    torch.manual_seed(0)
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    sizes = {**BART, **encoder, "vocab_size": VOCABULARY, "max_position_embeddings": 24}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **IDS)).eval()
    with torch.no_grad():
        model.model.shared.weight.mul_(3)
    for name, value in {"eos_token_id": 3, "forced_eos_token_id": None, **said}.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize(
    ("said", "new"),
    [({"max_length": 9}, 8), ({"max_length": 9, "forced_eos_token_id": 2}, 8), ({"max_new_tokens": 7}, 7), ({}, 23)],
)
def test_lengths_of_an_encoders_prompt_and_of_outputs_are_their_own(said, new):
    """A prompt that fills the encoder leaves the decoder all its positions, and `max_length` is the decoder's."""
    model, long = summarizer(**said), prompts(1, low=24, high=24)[0]
    how = {} if said else {"max_new_tokens": 23}
    ids = torch.tensor([long], device=model.device)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **how)[0, 1:].tolist()
    with engine(model, slots=2) as service:
        found = list(service(long).token_ids)
        assert found == wanted and len(found) == new
        with pytest.raises(
            RequestError,
            match=r"the prompt has 25 tokens, but Bart.* has 24 positions for the prompt and 24 for outputs",
        ):
            service.submit([*long, 5])
        with pytest.raises(
            RequestError, match=r"but Bart.* has 24 positions for the prompt and 24 .*: at most max_tokens=23"
        ):
            service.submit([5], max_tokens=24)
    with pytest.raises(
        BackendError, match=r"max_len=49, but Bart.* has 24 positions for the prompt and 24 for outputs"
    ):
        engine(summarizer(), max_len=49)


def test_an_encoder_may_have_more_positions_than_its_decoder():
    """LED reads a book and writes a page."""
    torch.manual_seed(0)
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "attention_window": 8}
    there = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 16}
    config = transformers.LEDConfig(**BART, **encoder, **there, vocab_size=VOCABULARY, **IDS, decoder_start_token_id=2)
    model = transformers.LEDForConditionalGeneration(config).eval()
    model.generation_config.max_length = None
    asked = [prompts(1, seed=length, low=length, high=length)[0] for length in (1, 40, 64)]
    wanted = [stock(model, prompt) for prompt in asked]
    with engine(model, slots=2) as service:
        answers = [service.submit(prompt, max_tokens=MAX) for prompt in asked]
        assert [list(answer.result(60).token_ids) for answer in answers] == wanted
        with pytest.raises(RequestError, match=r"the prompt has 65 tokens, but LED.* has 64 positions for the prompt"):
            service.submit([5] * 65)
        with pytest.raises(RequestError, match=r"and 16 for outputs, .*at most max_tokens=15"):
            service.submit([5], max_tokens=16)


@pytest.mark.parametrize("kind", ["bloom", "t5", "opt"])
def test_where_the_stock_library_would_keep_keys_and_values_is_nothing_that_requests_see(kind):
    """A static cache has room for one text, as long as it is asked; ours are put side by side."""
    model = MODELS[kind]() if kind in MODELS else made(kind, "eager", n_layer=2, n_head=4)
    wanted = [stock(model, prompt) for prompt in prompts(3)]
    model.generation_config.cache_implementation = "static"
    with engine(model, slots=3, max_len=64) as service:
        answers = [service.submit(prompt, max_tokens=MAX) for prompt in prompts(3)]
        assert [list(answer.result(60).token_ids) for answer in answers] == wanted
