"""Models whose requests have caches of their own: states, positions of their own, encoders."""

from __future__ import annotations

import pytest
import torch
import transformers
from texts import IDS, VOCABULARY, Drive, alone, made, prompts

import neustream
from neustream import BackendError
from neustream.backends.transformers import LanguageModel, proof_own
from neustream.backends.transformers.own import Own
from neustream.core.batch import input_of
from neustream.errors import StageFailed

MAX = 10
BART = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "d_model": 64}
KINDS = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "bart": {**BART, "is_decoder": True, "is_encoder_decoder": False, "forced_eos_token_id": None},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
}
BATCHED = {"bloom": True, "bart": False, "mamba2": True, "jamba": True}


def drive_of(kind, **options):
    return Drive(made(kind, "eager", **KINDS[kind]), max_len=64, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_with_caches_of_their_own_are_exact_in_any_company(kind):
    drive = drive_of(kind)
    stock = drive.texts.model.model
    wanted = [alone(stock, prompt, MAX, eos_token_id=-1) for prompt in prompts(4)]
    assert len({tuple(tokens) for tokens in wanted}) > 1
    assert drive.texts.model.way.batched == BATCHED[kind]
    jobs = [drive.job(prompt, MAX, ignore_eos=True) for prompt in prompts(4)]
    assert drive.shuffle(jobs, 1, chunk=9, evict=0.1) == wanted


@pytest.mark.parametrize("kind", ["bloom", "mamba2"])
def test_models_whose_weights_could_be_trained_are_measured_and_served(kind, tmp_path):
    model = made(kind, "eager", **KINDS[kind])  # as `from_pretrained` gives them
    assert all(weight.requires_grad for weight in model.parameters())
    with neustream.serve(model, slots=2, max_len=64, measure_s=0.1, cache=tmp_path) as service:
        assert list(service([5, 6], max_tokens=4).token_ids) == alone(model, [5, 6], 4)


def test_trials_of_a_long_context_take_no_more_than_is_affordable(monkeypatch):
    stretch, longest = Own.stretch, 0
    model = made("jamba", "eager", **{**KINDS["jamba"], "max_position_embeddings": 1 << 20})

    def noticed(own, state, count):
        nonlocal longest
        stretch(own, state, count)
        longest = max(longest, len(state.tokens))

    monkeypatch.setattr(Own, "stretch", noticed)
    monkeypatch.setattr(proof_own, "NOISE_BYTES", 1 << 21)
    monkeypatch.setattr(proof_own, "affordable", lambda *_: 40)
    texts = LanguageModel(model, slots=4, max_len=1 << 20)
    assert texts.way.batched and texts.max_len == 1 << 20
    layer = 2 * 2 * 16 * 4  # keys and values, heads, width, bytes
    assert 256 < longest <= (1 << 21) // (proof_own.ROWS * layer)


def test_decodes_share_calls_where_caches_can_be_side_by_side():
    drive = drive_of("bloom")
    jobs = [drive.job(prompt, 4, ignore_eos=True) for prompt in prompts(4)]
    drive.step(dict.fromkeys(jobs))
    calls = []
    drive.texts.model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    drive.step(dict.fromkeys(jobs))  # one more call, to see that the hook only watches
    calls.clear()
    drive.step(dict.fromkeys(jobs))
    assert len(calls) == 1


def test_a_request_that_fails_does_not_change_what_others_get():
    drive = drive_of("bloom")
    stock = drive.texts.model.model
    good, bad = prompts(2)
    wanted = alone(stock, good, 4, eos_token_id=-1)
    jobs = [drive.job(prompt, 4, ignore_eos=True) for prompt in (good, bad)]
    drive.step(dict.fromkeys(jobs))

    def break_off(module, inputs, output):
        if len(output[0]) > 1:
            raise ValueError("two at once")

    handle = stock.transformer.h[1].register_forward_hook(break_off)  # the first layer has written its keys by then
    drive.step(dict.fromkeys(jobs))
    handle.remove()
    assert drive.finish(jobs)[0] == wanted


def test_keys_and_values_of_their_own_are_not_moved_and_texts_go_on_without():
    drive = drive_of("bart")
    job = drive.job(prompts(1)[0], 4, ignore_eos=True)
    drive.step({job: None})
    assert drive.texts.export(input_of(job)) is None
    piece = Drive(made("opt", num_hidden_layers=1)).texts
    with pytest.raises(StageFailed, match="takes no keys and values: its requests have caches of their own"):
        drive.texts.adopt(input_of(job), piece)


def test_buckets_are_refused_by_name():
    with pytest.raises(BackendError, match="cannot be served with buckets: it takes no position_ids; give no buckets"):
        LanguageModel(made("bloom", "eager", **KINDS["bloom"]), max_len=64, buckets=[32])


def test_a_model_that_keeps_something_of_requests_in_itself_is_refused():
    model = made("bloom", "eager", **KINDS["bloom"])
    seen = []

    def remember(module, inputs, output):
        seen.append(1)
        return output + len(seen) * torch.arange(output.shape[-1], device=output.device)

    model.transformer.word_embeddings.register_forward_hook(remember)
    with pytest.raises(BackendError, match="BloomForCausalLM cannot be served: "):
        LanguageModel(model, max_len=64)


def test_a_model_that_draws_in_its_calls_is_refused_and_told_so():
    model = made("bloom", "eager", **KINDS["bloom"])
    model.transformer.word_embeddings.register_forward_hook(lambda module, given, out: out + torch.randn_like(out))
    with pytest.raises(BackendError, match="cannot be served: `generate` gives other logits each time"):
        LanguageModel(model, max_len=64)


def test_a_model_that_sets_the_random_numbers_is_refused_and_told_so():
    """As Reformer does with a `hash_seed`: what `generate` draws with a seed then goes by that."""
    model = made("bloom", "eager", **KINDS["bloom"])
    model.transformer.word_embeddings.register_forward_hook(lambda *_: torch.manual_seed(3) and None)
    torch.manual_seed(0)
    with pytest.raises(BackendError, match="cannot be served: its calls move or set torch's random numbers"):
        LanguageModel(model, max_len=64)


INDEXED = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "indexed_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "hc_lowrank": 8,
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}


def test_caches_that_keep_positions_too_are_exact_in_any_company():
    """Its indexer has the positions of all tokens in the cache, noise included: long contexts are tried with it."""
    drive = Drive(made("qwen4_exp_text", **INDEXED), max_len=64)
    stock = drive.texts.model.model
    wanted = [alone(stock, prompt, MAX, eos_token_id=-1) for prompt in prompts(3)]
    jobs = [drive.job(prompt, MAX, ignore_eos=True) for prompt in prompts(3)]
    assert drive.shuffle(jobs, 1, chunk=9, evict=0.1) == wanted


SPARSE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 16,
}


@pytest.mark.parametrize(("heads", "picked", "batched"), [(4, 8, False), (64, 8, True), (4, 64, True)])
def test_attention_that_picks_among_equal_scores_is_computed_one_by_one(heads, picked, batched):
    """With few heads many scores are 0, and the stock library picks among them by where they are in a call."""
    sizes = {**SPARSE, "index_n_heads": heads, "index_topk": picked}
    drive = Drive(made("deepseek_v32", "eager", **sizes), max_len=64)
    way = drive.texts.model.way
    assert way.batched == batched and ("an index of 4 heads" in way.why) != batched
    stock = drive.texts.model.model
    wanted = [alone(stock, prompt, MAX, eos_token_id=-1) for prompt in prompts(6)]
    jobs = [drive.job(prompt, MAX, ignore_eos=True) for prompt in prompts(6)]
    assert drive.shuffle(jobs, 1, chunk=9, evict=0.1) == wanted


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.7}, {"temperature": 0.9, "seed": 3}])
def test_an_encoder_reads_the_prompt_and_a_decoder_answers(sampling):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**{**sizes, **IDS, "decoder_start_token_id": 1})
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    asked = prompts(3)
    wanted = []
    for prompt in asked:
        options = {key: value for key, value in sampling.items() if key != "seed"}
        torch.manual_seed(sampling.get("seed", 0))
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=MAX, eos_token_id=-1, do_sample="seed" in sampling, top_k=0, **options)
        wanted.append(out[0, 1:].tolist())
    drive = Drive(model, max_len=64)
    assert isinstance(drive.texts.model.cache, Own)
    jobs = [drive.job(prompt, MAX, ignore_eos=True, **sampling) for prompt in asked]
    assert drive.shuffle(jobs, 1, chunk=9, evict=0.1) == wanted
