"""A text gets what the stock library makes of it alone, or its model is refused with the reason."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers
from test_texts import engine
from texts import VOCABULARY, Drive, alone, made, prompts

from neustream import BackendError, RequestFailed
from neustream.backends.transformers import LanguageModel
from neustream.backends.transformers.proof import apart, lengths_of

MAX = 12
NEO = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 256,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
}
LLAMA = {"intermediate_size": 128, "num_key_value_heads": 2}


def texts(*lengths):
    return [prompts(1, seed=at, low=n, high=n)[0] for at, n in enumerate(lengths)]


def assert_exact(model, asked, max_len=None, chunk=7, evict=0.1):
    wanted = [alone(model, prompt, MAX, eos_token_id=-1) for prompt in asked]
    assert len({tuple(tokens) for tokens in wanted}) > 1
    drive = Drive(model, max_len=max_len)
    free = {"ignore_eos": True}
    assert drive.finish([drive.job(prompt, MAX, **free) for prompt in asked]) == wanted
    assert drive.shuffle([drive.job(p, MAX, **free) for p in asked], 1, chunk, evict) == wanted


# -- what depends on lengths ------------------------------------------------------------------------


def test_local_attention_beyond_its_window_is_not_in_slots_and_exact():
    model = made("gpt_neo", "eager", **NEO | {"window_size": 16, "max_position_embeddings": 96})
    way = LanguageModel(model).way
    assert re.search(r"in company its logits differ .* \(tried with .* 95 tokens\)", way.why) and way.batched
    assert_exact(model, texts(3, 60, 40, 16))


def test_local_attention_within_its_window_is_exact():
    assert_exact(made("gpt_neo", "eager", **NEO), texts(3, 200, 40, 244), 256, chunk=90, evict=0.0)


@pytest.mark.parametrize("kind", ["llama", "olmo3"])
def test_angles_by_the_longest_request_are_found_wherever_the_config_has_them(kind):
    changes = {"rope_parameters": LONG}
    if kind == "olmo3":
        default = {"rope_type": "default", "rope_theta": 1e4}
        changes = {
            "rope_parameters": {"full_attention": LONG, "sliding_attention": default},
            "layer_types": ["full_attention", "full_attention"],
            "sliding_window": 4096,
        }
    model = made(kind, **LLAMA, **changes)
    way = LanguageModel(model).way
    assert re.search(r"type 'longrope', whose angles .* longest .*; give max_len=16 or less", way.why)
    assert not way.parts  # what a prompt makes of a token depends on how much of it is there
    assert_exact(model, texts(2, 30, 12))
    assert LanguageModel(model, max_len=16).way.why == ""


@pytest.mark.parametrize("kind", ["dynamic", "linear", "yarn"])
def test_angles_that_do_not_depend_on_company_are_served(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 16
    assert_exact(made("llama", **LLAMA, rope_parameters=rope), texts(2, 80, 15, 30))


def test_a_dependence_that_no_config_names_is_found():
    model = made("llama", **LLAMA)
    rotary = model.model.rotary_emb
    stock = rotary.forward

    def by_the_longest(x, position_ids):
        far = 2.0 if int(position_ids.max()) > 70 else 1.0
        return stock(x, (position_ids * far).long())

    rotary.forward = by_the_longest
    assert "in company its logits differ" in LanguageModel(model).way.why
    assert_exact(model, texts(2, 30, 9), max_len=70)


def test_positions_beyond_the_table_are_refused_and_those_in_it_are_exact():
    model = made("opt", ffn_dim=128, word_embed_proj_dim=64)
    table = model.model.decoder.embed_positions
    table.weight = torch.nn.Parameter(table.weight[:60].clone(), requires_grad=False)
    with pytest.raises(BackendError, match="up to max_len=96: a call at position 95 failed with IndexError"):
        LanguageModel(model)
    assert_exact(model, texts(46, 20, 3), max_len=58)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "roberta", "biogpt"])
def test_learned_positions_are_exact_up_to_the_last(kind):
    sizes = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}}
    known = {"ffn_dim": 128, "word_embed_proj_dim": 64, "d_model": 64, "num_layers": 2, "attention_heads": 4}
    model = made(kind, **sizes.get(kind, {**known, "intermediate_size": 128, "is_decoder": True}))
    assert LanguageModel(model).max_len == 96
    assert_exact(model, texts(96 - MAX, 5, 30))


def test_lengths_are_tried_around_each_number_that_the_config_has_for_them():
    config = {"vocab_size": 50, "deep": {"window_size": 40, "list": [{"original_max_position_embeddings": 64}]}}
    tried = lengths_of({**config, "hidden_size": 77}, 100)
    assert {1, 99, 39, 40, 41, 63, 64, 65} <= set(tried) and not {51, 76, 77, 78} & set(tried)
    assert lengths_of(config, 2) == [1]


def test_a_trial_leaves_nothing_behind():
    model = made("llama", **LLAMA, rope_parameters=LONG)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert LanguageModel(model).way.why
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0] and torch.equal(buffer, before[name][1])


# -- logits that are none ---------------------------------------------------------------------------


def masked(model, first):
    """Tokens from `first` on are never chosen: a vocabulary that was padded."""

    def mask(module, inputs, logits):
        return logits.index_fill(-1, torch.arange(first, logits.shape[-1], device=logits.device), float("-inf"))

    model.lm_head.register_forward_hook(mask)
    return model


def test_a_masked_part_of_the_vocabulary_is_served():
    assert_exact(masked(made("llama", **LLAMA), 60), texts(3, 20, 9))


def test_logits_are_compared_where_they_are_finite():
    some = torch.tensor([1.0, -4.0, float("-inf")])
    assert apart(some + torch.tensor([0.0, 0.4, 0.0]), some) == pytest.approx(0.1)
    assert apart(torch.tensor([1.0, -4.0, 0.0]), some) == float("inf")
    assert apart(torch.tensor([1.0, float("nan"), float("-inf")]), some) == float("inf")
    assert apart(-some[:1], some[:1]) == 2.0


@pytest.mark.parametrize(
    "ids", [7, [7], (7,), {7}, torch.tensor(7), torch.tensor([7]), np.int64(7), np.array([7]), [np.int32(7)]]
)
def test_eos_may_be_given_in_any_form(ids):
    model = made("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=96)
    model.generation_config.eos_token_id = ids
    assert LanguageModel(model, slots=1).eos == {7}


@pytest.mark.parametrize("ids", ["</s>", 7.0, [None], torch.tensor([7.0]), -1])
def test_eos_that_is_no_token_is_refused(ids):
    model = made("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=96)
    model.generation_config.eos_token_id = ids
    with pytest.raises(BackendError, match="eos_token_id of GPT2LMHeadModel: a token id must be a whole number"):
        LanguageModel(model, slots=1)


# -- one bad row fails itself alone -----------------------------------------------------------------

BAD = 50
"""A token that the models below have something against."""


def raising(model):
    def hook(module, inputs):
        if bool((inputs[0] == BAD).any()):
            raise ValueError("I do not like it")

    model.get_input_embeddings().register_forward_pre_hook(hook)


def poisoned(value):
    def poison(model):
        def hook(module, inputs, output):
            return output.masked_fill((inputs[0] == BAD)[..., None], value)

        model.get_input_embeddings().register_forward_hook(hook)

    return poison


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (None, {"temperature": 1e-40}, "no token has a probability with temperature=1e-40"),
        (None, {"temperature": 5e-324, "top_p": 0.5, "top_k": 3}, "no token has a probability with"),
        (raising, {}, "the model raised ValueError: I do not like it"),
        (poisoned(float("nan")), {}, "the model's logits are NaN or infinite"),
        (poisoned(float("inf")), {"temperature": 1.0}, "the model's logits are NaN or infinite"),
    ],
)
def test_a_bad_row_fails_itself_alone(make, options, reason):
    model = made("llama", **LLAMA)
    good = [[token for token in prompt if token != BAD] or [5] for prompt in prompts(5)]
    masked(model, BAD)
    wanted = [tuple(alone(model, prompt, 40, eos_token_id=-1)) for prompt in good]
    with engine(model) as running:
        if make is not None:
            model._forward_hooks.clear()
            make(model)
        under_way = [running.submit(prompt, max_tokens=40, ignore_eos=True) for prompt in good]
        next(iter(under_way[0]))
        sick = [running.submit([9, BAD, 9], max_tokens=5, **options) for _ in range(2)]
        for answer in sick:
            with pytest.raises(RequestFailed, match=reason):
                answer.result(60)
        assert [answer.result(60).token_ids for answer in under_way] == wanted
        assert running.models[""].used == 0


def test_a_sampling_that_raises_fails_its_own_row(monkeypatch):
    from neustream.backends.transformers import draws

    model = made("llama", **LLAMA)
    wanted = alone(model, [5, 6, 7], MAX, temperature=0.7, seed=3)

    class Picky(draws.TypicalLogitsWarper):
        def __call__(self, ids, scores):
            raise RuntimeError("not today")

    monkeypatch.setattr(draws, "TypicalLogitsWarper", Picky)
    with engine(model) as running:
        fine = running.submit([5, 6, 7], max_tokens=MAX, temperature=0.7, seed=3)
        with pytest.raises(RequestFailed, match="its sampling raised RuntimeError: not today"):
            running.submit([5, 6], max_tokens=MAX, temperature=0.7, typical_p=0.5, seed=1).result(60)
        assert list(fine.result(60).token_ids) == wanted


def test_a_token_without_an_embedding_ends_its_request_by_name():
    model = made("llama", **LLAMA, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(64, VOCABULARY + 8)
    with pytest.raises(IndexError):
        alone(model, [5, 6, 7], MAX, bad_words_ids=[[n] for n in range(VOCABULARY)])
    with engine(model) as running:
        answers = [running.submit(prompt, max_tokens=30, ignore_eos=True) for prompt in prompts(6)]
        errors = [answer.exception(60) for answer in answers]
    bad = [str(error) for error in errors if error is not None]
    assert bad and all("has no embedding to go on with: there are 96" in text for text in bad)
    for prompt, answer, error in zip(prompts(6), answers, errors, strict=True):
        if error is None:
            assert list(answer.result().token_ids) == alone(model, prompt, 30, eos_token_id=-1)


def test_layers_that_a_text_does_not_use_are_left_alone():
    """A cross-attention layer without an image: slots are moved, read and written beside it."""
    config = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 128, "cross_attention_layers": [1]}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 96}
    torch.manual_seed(0)
    model = transformers.MllamaForCausalLM(transformers.MllamaTextConfig(**config, pad_token_id=1)).eval()
    for weight in model.parameters():
        weight.data.mul_(4 if weight.dim() > 1 else 1)
    assert [layer.is_initialized for layer in LanguageModel(model).cache.layers] == [True, False]
    assert_exact(model, texts(3, 20, 9))
