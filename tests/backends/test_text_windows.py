"""Windows and chunks of attention, far beyond their length, in company."""

from __future__ import annotations

import pytest
import torch
from texts import Drive, alone, made, prompts

from neustream.backends.transformers.masks import NotShared, Reach, masks_of

MAX = 12
SMALL = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
KINDS = {
    "mistral": {**SMALL, "sliding_window": 8},
    "gemma2": {**SMALL, "sliding_window": 8},
    "gpt_oss": {**SMALL, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "llama4_text": {**SMALL, "attention_chunk_size": 8, "intermediate_size_mlp": 64, "num_local_experts": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_chunks_are_exact_in_any_company(kind):
    model = made(kind, "sdpa" if kind == "mistral" else "eager", **KINDS[kind])
    asked = [prompts(1, seed=at, low=n, high=n)[0] for at, n in enumerate((3, 60, 8, 30))]
    wanted = [alone(model, prompt, MAX, eos_token_id=-1) for prompt in asked]
    drive = Drive(model, max_len=80)
    assert drive.shuffle([drive.job(p, MAX, ignore_eos=True) for p in asked], 1, chunk=7, evict=0.1) == wanted


def test_a_window_is_exact_with_buckets():
    model = made("mistral", **KINDS["mistral"])
    wanted = [alone(model, prompt, MAX) for prompt in prompts(4)]
    drive = Drive(model, buckets=[32])
    assert drive.shuffle([drive.job(prompt, MAX) for prompt in prompts(4)], 1, chunk=6) == wanted


def test_what_a_layer_sees():
    keys, at = torch.arange(8), torch.tensor([[5]])
    assert Reach(3).within(keys, at).flatten().tolist() == [False] * 3 + [True] * 5
    assert Reach(4, chunked=True).within(keys, at).flatten().tolist() == [False] * 4 + [True] * 4


def test_layers_that_keep_more_than_keys_and_values_are_named():
    model = made("jamba", num_experts=2, intermediate_size=64, attn_layer_period=2, attn_layer_offset=1)
    with pytest.raises(NotShared, match="layer 0 of its cache is a LinearAttentionLayer"):
        masks_of(model, 64, None)
