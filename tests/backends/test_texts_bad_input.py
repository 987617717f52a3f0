"""Every argument of a language model that is wrong says so; those that are right in another form are taken."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from test_texts import engine
from texts import VOCABULARY, alone, made
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from toys import Flat

from neustream import BackendError, NeustreamError, RequestError
from neustream.backends.copies import twin
from neustream.backends.transformers import TextMount
from neustream.backends.transformers.from_config import byte_tokenizer

SIZES = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 96}
HUGE = 10**5000
"""Of more digits than Python prints."""


@pytest.fixture(scope="module")
def model():
    return made("gpt2", **SIZES, vocab_size=257, eos_token_id=256)


@pytest.fixture(scope="module")
def shared(model):
    with engine(model, byte_tokenizer()) as running:
        yield running


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": np.array([], dtype=int)}, "the prompt is empty"),
        ({"prompt": "x" * 10_000}, "the prompt has 10000 tokens, but GPT2LMHeadModel has 96 positions: at most 95"),
        ({"prompt": "a\ud800b"}, r"the prompt is no text: '\\ud800' at 1 is half a character"),
        ({"prompt": None}, "a prompt must be text, messages or a list of token ids, got NoneType"),
        ({"prompt": {"text": "a"}}, "got dict"),
        (
            {"prompt": [{"role": "user", "content": "hi"}]},
            "a prompt of messages needs a tokenizer with a chat template",
        ),
        ({"prompt": {"input_ids": [[3, 4], [5]]}}, "a request has one prompt, got a batch of 2"),
        ({"prompt": torch.tensor([[3], [5], [6]])}, "a request has one prompt, got a batch of 3"),
        ({"prompt": np.array([[[3, 4]]])}, "a flat list of token ids, got list in it"),
        ({"prompt": {"input_ids": [1, 4], "attention_mask": [0, 1]}}, "attention_mask: a prompt has no padding"),
        ({"prompt": {"input_ids": [4], "position_ids": [3]}}, "position_ids beside input_ids is not taken"),
        ({"prompt": ["a", "b"]}, "a flat list of token ids, got str in it"),
        ({"prompt": [3, None]}, "got NoneType in it"),
        ({"prompt": [HUGE]}, "a int is no token: the vocabulary of GPT2LMHeadModel has 257"),
        ({"prompt": [np.int64(2**62)]}, "is no token: the vocabulary of GPT2LMHeadModel has 257"),
        ({"prompt": np.array([1.0, 2.0])}, "got float in it"),
        ({"prompt": np.array([True])}, "got bool in it"),
        ({"prompt": [np.bool_(True)]}, "got bool in it"),
        ({"prompt": torch.tensor(3)}, "a prompt must be a list of token ids, got 3"),
        ({"prompt": np.array(["a"])}, "got str in it"),
        (
            {"prompt": (token for token in (3, 4))},
            "a prompt must be text, messages or a list of token ids, got generator",
        ),
        ({"max_tokens": np.float64(3)}, r"max_tokens must be a whole number of 1 or more, got np\.float64\(3\.0\)"),
        ({"max_tokens": np.bool_(True)}, "got np.True_"),
        ({"max_tokens": [3]}, r"got \[3\]"),
        (
            {"max_tokens": HUGE},
            "max_tokens=a int make a int, but GPT2LMHeadModel has 96 positions: at most max_tokens=94",
        ),
        ({"temperature": HUGE}, "temperature must be a finite number >= 0, got a int"),
        ({"temperature": np.float32("nan")}, "temperature must be a finite number >= 0, got"),
        ({"temperature": True}, "got True"),
        ({"temperature": 1j}, "got 1j"),
        ({"temperature": Decimal("0.5")}, "got Decimal"),
        ({"temperature": [0.7]}, r"got \[0\.7\]"),
        ({"top_p": "0.9"}, "top_p must be a number above 0 and up to 1, got '0.9'"),
        ({"top_p": np.float64("inf")}, "got np.float64"),
        ({"top_p": -0.0}, "got -0.0"),
        ({"top_k": 2.0}, "top_k must be a whole number from 0 on, got 2.0"),
        ({"seed": 1.5}, "seed must be a whole number from 0 to 9223372036854775807, got 1.5"),
        ({"seed": HUGE}, "got a int"),
        ({"seed": "lucky"}, "got 'lucky'"),
        ({"stop_token_ids": b"ab"}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": ["</s>"]}, "a token id must be a whole number from 0 on, got '</s>'"),
        ({"stop_token_ids": [True]}, "got True"),
        ({"stop_token_ids": [HUGE]}, "a int is no token: the vocabulary has 257"),
        ({"stop_token_ids": np.array([1.5])}, r"got 1\.5"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"ignore_eos": None}, "got None"),
        ({"min_tokens": -1}, "min_tokens must be a whole number from 0 on, got -1"),
        ({"min_tokens": True}, "got True"),
        ({"min_tokens": 4}, "min_tokens=4 is more than max_tokens=3"),
        ({"slo": "5"}, "slo must be an SLO or seconds, got '5'"),
        ({"slo": True}, "slo must be an SLO or seconds, got True"),
        ({"slo": float("nan")}, "SLO: total"),
        ({"slo": [1.0]}, "slo must be an SLO or seconds"),
        ({"id": 7}, "id"),
        ({"model": "gpt2"}, "model='gpt2'"),
    ],
)
def test_a_wrong_argument_names_itself_and_what_is_allowed(shared, arguments, message):
    before = shared.report.submitted
    with pytest.raises(RequestError, match=message) as error:
        shared.submit(**{"prompt": [3, 4], "max_tokens": 3, **arguments})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert shared.report.submitted == before and shared.snapshot().open == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": [np.int64(5), np.uint8(6), 7]},
        {"prompt": np.array([5, 6, 7], dtype=np.int16)},
        {"prompt": torch.tensor([5, 6, 7], dtype=torch.int32)},
        {"prompt": torch.tensor([[5, 6, 7]])},
        {"prompt": np.array([[5, 6, 7]])},
        {"prompt": {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}},
        {"prompt": {"input_ids": [[5, 6, 7]]}},
        {"prompt": range(5, 8)},
        {"prompt": "\x05\x06\x07"},
        {"max_tokens": np.int64(9)},
        {"temperature": np.float32(0)},
        {"temperature": Fraction(0)},
        {"temperature": np.int8(0)},
        {"top_p": np.float16(1)},
        {"top_k": np.int32(0)},
        {"stop_token_ids": np.array([], dtype=int)},
        {"stop_token_ids": {np.int64(256)}},
        {"stop_token_ids": torch.tensor([256])},
        {"ignore_eos": np.bool_(False)},
        {"slo": np.float64(60.0)},
        {"slo": np.int64(60)},
        {"slo": Fraction(60)},
    ],
)
def test_arguments_of_other_types_mean_the_same(model, shared, arguments):
    wanted = alone(model, [5, 6, 7], 9)
    done = shared(**{"prompt": [5, 6, 7], "max_tokens": 9, **arguments})
    assert list(done.token_ids) == wanted and done.prompt_tokens == 3


@pytest.mark.parametrize(
    "drawn",
    [
        {"temperature": np.float64(0.7), "seed": np.int64(3), "top_k": np.int64(20), "top_p": np.float64(0.9)},
        {"temperature": Fraction(7, 10), "seed": 3, "top_k": 20, "top_p": Fraction(9, 10)},
    ],
)
def test_numbers_of_numpy_draw_as_plain_ones(model, shared, drawn):
    plain = {"temperature": 0.7, "seed": 3, "top_k": 20, "top_p": 0.9}
    wanted = alone(model, [5, 6, 7], 9, **plain)
    assert list(shared([5, 6, 7], max_tokens=9, **drawn).token_ids) == wanted


def template_tokenizer(begins):
    """A tokenizer of whole words with a chat template that has a BOS; `begins`: it puts one before each text too."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "hi", "user:"]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        one = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        made.post_processor = one
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    return tokenizer


@pytest.mark.parametrize("begins", [True, False])
def test_a_text_with_a_bos_gets_no_other(model, begins):
    tokenizer = template_tokenizer(begins)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert ids["input_ids"] == [0, 5, 4]
    end = [2] if begins else []
    expected = {chat: [0, 5, 4, *end], "<s> <s> hi": [0, 0, 4, *end], "<s>": [0, *end]}
    expected["hi"] = [0, 4, *end] if begins else [4]
    with engine(twin(model), tokenizer) as running:
        for text, wanted in expected.items():
            done = running(text, max_tokens=8)
            assert list(done.token_ids) == alone(model, wanted, 8) and done.prompt_tokens == len(wanted)
        assert list(running(ids, max_tokens=8).token_ids) == alone(model, [0, 5, 4], 8)


def test_a_tokenizer_without_eos_or_pad_ends_at_max_tokens(model):
    bare = twin(model)
    tokenizer = template_tokenizer(begins=False)
    assert tokenizer.eos_token is None and tokenizer.pad_token is None
    bare.generation_config.eos_token_id = bare.config.eos_token_id = None
    with engine(bare, tokenizer) as running:
        done = running("hi hi", max_tokens=20)
        assert (len(done.token_ids), done.finish_reason) == (20, "length") and isinstance(done.text, str)
        assert len(running("hi hi").token_ids) == 94  # to the end of the context


def test_the_largest_and_smallest_of_what_is_allowed(model, shared):
    wanted = alone(model, [5, 6, 7], 9)
    for edge in ({"top_k": HUGE}, {"top_k": 1}, {"top_p": 1e-300}, {"temperature": 1e-30}):
        done = shared([5, 6, 7], max_tokens=9, **{"temperature": 1.0, "seed": 2**63 - 1, **edge})
        if edge != {"top_k": HUGE}:
            assert list(done.token_ids) == wanted
    assert shared([5] * 95, max_tokens=1).token_ids == tuple(alone(model, [5] * 95, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be a whole number from 1 to 2147483647, got 0"),
        ({"slots": "4"}, "got '4'"),
        ({"slots": 4.0}, r"got 4\.0"),
        ({"slots": True}, "got True"),
        ({"slots": None}, "got None"),
        ({"slots": HUGE}, "slots"),
        ({"max_len": 1}, "max_len must be a whole number of 2 or more, got 1"),
        ({"max_len": "96"}, "got '96'"),
        ({"max_len": 96.0}, r"got 96\.0"),
        ({"max_len": 97}, "max_len=97, but GPT2LMHeadModel has 96 positions"),
        ({"max_len": HUGE}, "max_len=a int, but GPT2LMHeadModel has 96 positions"),
        ({"kv_cache": 5}, "kv_cache must be a KVCache, got 5"),
        ({"kv_cache": "big"}, "kv_cache must be a KVCache, got 'big'"),
        ({"profile": 5}, "profile must be a step profile or its file, got 5"),
        ({"profile": {"prefill": 1}}, "profile must be a step profile or its file"),
        ({"profile": "/nowhere/steps.json"}, "no step profile at"),
        ({"measure_s": "long"}, "measure_s must be a number above 0, got 'long'"),
        ({"measure_s": -1}, "measure_s must be a number above 0, got -1"),
        ({"measure_s": float("nan")}, "got nan"),
        ({"cache": 5}, "cache must be a folder, got 5"),
        ({"progress": "yes"}, "progress must be True, False or None, got 'yes'"),
        ({"tokenizer": "gpt2"}, "a tokenizer is an object that is called with text, got 'gpt2'"),
    ],
)
def test_a_wrong_option_names_itself(model, options, message):
    with pytest.raises(NeustreamError, match=message) as error:
        mounted = {"profile": Flat(), **options}
        engine(twin(model), mounted.pop("tokenizer", None), **mounted)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_numpy_numbers_are_options_too(model):
    options = {"slots": np.int64(2), "max_len": np.int32(64), "buckets": [np.int64(32)], "measure_s": np.float32(1)}
    with engine(twin(model), **options) as running:
        assert list(running([5, 6, 7], max_tokens=9).token_ids) == alone(model, [5, 6, 7], 9)
        assert running.models[""].model.max_len == 64


def test_what_is_no_model_is_none():
    for wrong in ("gpt2", None, torch.nn.Linear(2, 2), VOCABULARY):
        with pytest.raises(BackendError, match="a language model is a transformers model, got"):
            TextMount(wrong)
