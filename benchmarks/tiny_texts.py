"""Tiny text and image encoders of transformers with random weights, and tokenizers that need no files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from each_class import NotBuilt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from neustream.backends.diffusers.from_config import byte_tokenizer, letter_tokenizer

WIDTH = 32
VOCABULARY = 256
"""More than any tokenizer here has tokens, but for CLIP's."""
SPECIAL: tuple[str, ...] = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
)
SPECIAL += ("<|image_pad|>", "<|video_pad|>", "<img>", "<image>")
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|image_pad|>{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}"""
DECODER: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
VISION: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": WIDTH,
    "image_size": 32,
    "patch_size": 16,
}
T5: Mapping[str, Any] = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def any_tokenizer(length: int = 2048) -> Any:
    """Printable ASCII, letter by letter, with the special tokens of chats."""
    letters = [chr(code) for code in range(ord(" "), ord("~") + 1)] + ["\n"]
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        model_max_length=length,
    )
    made.chat_template = TEMPLATE
    made.image_token_id, made.video_token_id = SPECIAL.index("<|image_pad|>"), SPECIAL.index("<|video_pad|>")
    return made


def tokenizer_of(kind: str, tokenizer: str = "", **_: Any) -> Any:
    """A tokenizer for a class of them; `tokenizer`: another class than a pipeline declares."""
    kind = tokenizer or kind
    if kind == "CLIPTokenizer":
        return byte_tokenizer()
    if kind in ("T5Tokenizer", "T5TokenizerFast"):
        return letter_tokenizer()
    return any_tokenizer()


def transformer_of(kind: str, change: Mapping[str, Any], texts: Mapping[str, Any]) -> Any:
    """A model (or an image processor) of transformers. NotBuilt: there is no tiny one."""
    made = _image_processor(kind) or _vision(kind, change)
    if made is not None:
        return made
    if kind in ("PreTrainedModel", "Gemma2PreTrainedModel", "GemmaPreTrainedModel", "AutoModel"):
        kind = texts.get("encoder", {"GemmaPreTrainedModel": "GemmaModel"}.get(kind, "Gemma2Model"))
    model = getattr(transformers, kind, None)
    if model is None or not hasattr(model, "config_class"):
        raise NotBuilt(f"no tiny {kind}")
    if kind.startswith("CLIPText"):
        return model(transformers.CLIPTextConfig(**{**_ids(byte_tokenizer()), **VISION_TEXT, **change}))
    if kind in ("T5EncoderModel", "UMT5EncoderModel"):
        return model(model.config_class(**{"vocab_size": VOCABULARY, **T5, **change}))
    return _decoder(model, change)


VISION_TEXT: Mapping[str, Any] = {name: VISION[name] for name in VISION if name not in ("image_size", "patch_size")}


def _ids(tokenizer: Any) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **ids}


def _image_processor(kind: str) -> Any:
    if kind.startswith("CLIPImageProcessor"):
        return transformers.CLIPImageProcessorPil(size=32, crop_size=32)
    if kind.startswith("SiglipImageProcessor"):
        return transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return None


def _vision(kind: str, change: Mapping[str, Any]) -> Any:
    if kind in ("CLIPVisionModel", "CLIPVisionModelWithProjection"):
        return getattr(transformers, kind)(transformers.CLIPVisionConfig(**{**VISION, **change}))
    if kind == "SiglipVisionModel":
        given = {name: value for name, value in VISION.items() if name != "projection_dim"}
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**given, **change}))
    return None


def _decoder(model: Any, change: Mapping[str, Any]) -> Any:
    """A language model, or one that sees: its text part as small as its vision part."""
    ids = {**_ids(any_tokenizer()), "vocab_size": VOCABULARY}
    config = model.config_class
    inner = getattr(config, "sub_configs", {})
    if "text_config" not in inner:
        return model(config(**{**DECODER, **ids, **_rope(config.__name__), **change}))
    given: dict[str, Any] = {"text_config": {**DECODER, **ids, **_rope(config.__name__)}}
    if "vision_config" in inner:
        given["vision_config"] = _seeing(config.__name__)
    tokens = {"image_token_id": SPECIAL.index("<|image_pad|>"), "video_token_id": SPECIAL.index("<|video_pad|>")}
    tokens |= {"vision_start_token_id": SPECIAL.index("<|vision_start|>")}
    tokens |= {"vision_end_token_id": SPECIAL.index("<|vision_end|>"), "image_token_index": tokens["image_token_id"]}
    tokens |= {"pad_token_id": 0}
    with torch.no_grad():
        return model(config(**{**given, **tokens, **change}))


def _rope(config: str) -> dict[str, Any]:
    if config.startswith("Qwen") and "VL" in config:
        return {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    return {}


def _seeing(config: str) -> dict[str, Any]:
    """The vision part of a model that sees."""
    if config.startswith("Qwen2_5"):
        own = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": WIDTH, "intermediate_size": 32}
        return {**own, "fullatt_block_indexes": [0], "patch_size": 14, "window_size": 112}
    if config.startswith("Qwen2VL"):
        return {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 1}
    if config.startswith("Qwen3VL"):
        own = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": WIDTH, "intermediate_size": 32}
        return {**own, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return {name: value for name, value in VISION.items() if name != "projection_dim"}


def odd_text(kind: str, **change: Any) -> Any:
    """A text encoder of diffusers' own, on XLM-RoBERTa."""
    from tiny_pipelines import class_named

    model = class_named(kind)
    ids = {**_ids(any_tokenizer()), "vocab_size": VOCABULARY, "pad_token_id": 0}
    given = {name: value for name, value in DECODER.items() if name not in ("head_dim", "num_key_value_heads")}
    return model(model.config_class(**{**given, **ids, **change}))


def example_encoder() -> Any:
    """The image encoder of PaintByExamplePipeline, which its class makes with more than a configuration."""
    from tiny_pipelines import class_named

    return class_named("PaintByExampleImageEncoder")(transformers.CLIPVisionConfig(**VISION), proj_size=WIDTH)
