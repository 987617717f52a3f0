"""Causal language models of transformers, built tiny from their own configurations with random weights.

`config_of(kind)` takes a model type's default configuration and makes every number in it small, by its
name: widths, layers, heads, experts, windows, positions, at all depths. What a model needs in its own
way is in `CHANGES`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from each_class import NotBuilt
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
POSITIONS = 128
WINDOW = 8
LAYERS = 4
WIDTH = 64
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
RULES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"(first_k_dense_replace|num_dense_layers|n_shared_experts|num_shared_experts|n_groups?|topk_groups?)", 1),
    (r"(moe_layer_start_index|mtp_num_hidden_layers|num_nextn_predict_layers)", 1),
    (r"(num_)?(hidden_|decoder_|encoder_)?layers|n_layers?|num_(decoder|encoder)_layers|num_layers", LAYERS),
    (r".*(num_key_value_heads|n_head_kv|num_kv_heads|multi_query_group_num|num_key_value_groups)", 2),
    (r"(num_|n_)?(.*_)?(attention_)?heads?|.*num_heads|.*num_attention_heads|.*(k|v)_heads", 4),
    (r"(.*_)?(head_dim|kv_channels|d_kv|d_head)|qk_nope_head_dim|v_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r".*lora_rank", 16),
    (r".*(num|n)_?(local_|routed_)?experts|moe_num_experts|num_experts", 4),
    (r".*(experts_per_tok|experts_per_token|moe_topk|moe_top_k|top_k_experts|moe_k)", 2),
    (r"(sliding|attention|local).*window.*|window_size|attention_chunk_size|.*sliding_window", WINDOW),
    (r".*max_position_embeddings|n_positions|n_ctx|max_(target_|source_)?positions", POSITIONS),
    (r"max_seq_len|max_sequence_length|model_max_length", POSITIONS),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff|dff|mlp_hidden_size).*", 64),
    (r".*(hidden_size|d_model|n_embd|embedding_size|dim_model|embed_dim|word_embed_proj_dim)", WIDTH),
    (r"emb_dim|d_embed|lru_width", WIDTH),
    (r".*(state_size|d_state|ssm_state.*)", 8),
    (r".*(conv_kernel|d_conv|conv_kernel_dim|conv_kernel_size|conv1d_width|conv_L_cache)", 4),
)
"""By what a number is called (the first that fits): what it becomes, where it was larger."""
FILLED = {"head_dim": 16, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1}
FILLED |= {"num_experts_per_tok": 2}
"""What takes the place of None."""
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
KINDS = ["full_attention", "conv", "full_attention", "conv"]
ROPE = {"rope_theta": 10000.0}
PLAIN_ROPE = {"rope_type": "default", **ROPE}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
LATENT |= {"head_dim": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, **ROPE}
LONG |= {"original_max_position_embeddings": 16, "factor": 4.0}
INDEXED = {"index_topk": 16, "index_n_heads": 64}
"""Attention to 16 tokens. With few heads many scores are 0, and which of these are among the 16 is nobody's choice."""
CHANGES: dict[str, Mapping[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_local_experts": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}, "num_key_value_heads": 4},
    "deepseek_v32": INDEXED,
    "dots3_note_text": {"num_key_value_heads": 4, **INDEXED, "per_layer_config": {1: LATENT, 3: LATENT}},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm_moe_dsa": INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": KINDS},
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 8,
        "hc_lowrank": 8,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (32, 32),
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "attention_head_size": 16,
    },
    "whisper": {"begin_suppress_tokens": [3, 4]},
    "xlnet": {"d_head": 16},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "adapter_rank": 8},
}
CHANGES["qwen4_exp"] = {"text_config": CHANGES["qwen4_exp_text"]}
"""What models need beside that, by model type."""
VARIANTS: dict[str, Mapping[str, Any]] = {
    "gpt_neo:window": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "llama:dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE},
        "max_position_embeddings": 64,
    },
    "llama:linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}},
    "llama:llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            **ROPE,
        }
    },
    "llama:longrope": {"rope_parameters": LONG},
    "llama:yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            **ROPE,
        }
    },
    "olmo3:longrope": {
        "rope_parameters": {"full_attention": LONG, "sliding_attention": PLAIN_ROPE},
        "layer_types": ["full_attention"] * LAYERS,
        "sliding_window": 4096,
    },
    "phi3:longrope": {
        "rope_parameters": {**LONG, "partial_rotary_factor": 1.0},
        "original_max_position_embeddings": 16,
    },
    "qwen2:window": {"use_sliding_window": True, "max_window_layers": 2, "layer_types": None},
    "falcon:alibi": {"alibi": True},
    "mistral:no_window": {"sliding_window": None},
}
"""Positions and windows that models of a type may have, beside its default."""


def names() -> list[str]:
    """Every model type that AutoModelForCausalLM knows, and `type:variant` for VARIANTS."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])


def build(kind: str) -> Any:
    """The model of a type; the same weights each time, large enough for its tokens to vary."""
    config = config_of(kind)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if sum(weight.numel() for weight in model.parameters()) > 2e7:
        raise NotBuilt(f"{sum(weight.numel() for weight in model.parameters()):,} weights: not tiny")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight.is_floating_point():
                weight.mul_(4)
    return model.float()


def config_of(kind: str) -> Any:
    """A type's (or a variant's) configuration with small numbers."""
    family = kind.partition(":")[0]
    default = transformers.CONFIG_MAPPING[family]()
    return _rebuilt(default, {**CHANGES.get(family, {}), **VARIANTS.get(kind, {})})


def _rebuilt(config: Any, change: Mapping[str, Any]) -> Any:
    """A configuration of the same class with small numbers."""
    inner = dict(getattr(type(config), "sub_configs", {}))
    given = _small_fields(config, inner, change)
    own = _fields(config)
    if "encoder_layers" in own:
        given["encoder_layers"] = LAYERS
    if "kv_lora_rank" in given:  # latent attention has keys for every head
        given["num_key_value_heads"] = 4
    given |= _short_lists(own, given)
    if own.get("is_decoder") is False:
        given["is_decoder"] = True
    given |= {name: at for name, at in IDS.items() if name in own or name == "eos_token_id"}
    given |= {name: value for name, value in change.items() if name not in inner}
    return type(config)(**given)


def _small_fields(config: Any, inner: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are to be others: configurations within (`inner` names them), and numbers."""
    given: dict[str, Any] = {}
    for name, value in _fields(config).items():
        if hasattr(value, "to_dict"):
            given[name] = _rebuilt(value, change.get(name, {})).to_dict()
        elif name in inner:
            continue
        elif value is None and name in FILLED:
            given[name] = FILLED[name]
        elif (small := _small(name, value)) is not value:
            given[name] = small
    return given


def _short_lists(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, for as many layers as there will be."""
    layers = next((given[name] for name in given if re.fullmatch(RULES[3][0], name)), LAYERS)
    found = {}
    for name, value in own.items():
        by_layer = name.endswith(("types", "type", "pattern")) and isinstance(value, list | tuple)
        if by_layer and len(value) > layers:
            found[name] = _shortened(list(value), layers)
    return found


def _fields(config: Any) -> dict[str, Any]:
    hidden = ("transformers_version", "architectures", "model_type", "dtype", "torch_dtype")
    return {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in hidden}


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.endswith("_token_id") or name.endswith("_token_index"):
        return value if value < VOCABULARY else 3 + value % (VOCABULARY - 3)
    for rule, most in RULES:
        if re.fullmatch(rule, name):
            return min(value, most) if value > 0 else value
    return value


def _shortened(values: list[Any], count: int) -> list[Any]:
    """As many values, of each kind one at least: the kinds in turns."""
    kinds = list(dict.fromkeys(map(str, values)))
    by_name = {str(value): value for value in values}
    return [by_name[kinds[at % len(kinds)]] for at in range(count)]


def prompt(at: int, length: int) -> list[int]:
    draw = random.Random(at)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]
