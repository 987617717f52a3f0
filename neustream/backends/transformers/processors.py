"""Which of the library's classes load a language model, and processors of those that look at images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from neustream.backends.tokenizer import tokenizer_in
from neustream.backends.transformers.eyes import image_token
from neustream.errors import BackendError, told

MARK = "<image>"


def class_of(config: Any) -> Any:
    """The automatic class that makes a language model of a config: with eyes, where it has some."""
    kind = type(config)
    sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees or kind not in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForCausalLM


def processor_in(folder: Path, model: PreTrainedModel) -> Any:
    """The processor that a checkpoint has; of a model without eyes, its tokenizer.

    BackendError: the processor cannot be made here, and why.
    """
    if not hasattr(model, "get_image_features"):
        return tokenizer_in(folder)
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file ends in whatever reads it
        raise BackendError(
            f"the processor in {str(folder)!r} cannot be made: {told(error)}; for texts only, name the folder as its "
            "tokenizer"
        ) from error


def processor_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The processor of a LLaVA made from a config, around a tokenizer of bytes; of models without eyes, the tokenizer.

    BackendError: a model of another type that looks at images, or its image token is another.
    """
    if not hasattr(model, "get_image_features"):
        return tokenizer
    config, kind = model.config, model.config.model_type
    if kind != "llava":
        raise BackendError(
            f"no processor is made for model_type {kind!r}, only for llava: give a checkpoint with its own"
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    token = tokenizer.convert_tokens_to_ids(MARK)
    if image_token(model) != token:
        raise BackendError(f"backend.config.image_token_index must be {token}, got {image_token(model)}")
    side = config.vision_config.image_size
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def with_image(processor: Any, tokens: Sequence[int], draw: np.random.Generator) -> dict[str, Any]:
    """What a processor makes of a random picture, in front of tokens: as many in all as there are `tokens`.

    BackendError: fewer than the picture has.
    """
    picture = Image.fromarray(draw.integers(256, size=(336, 336, 3), dtype=np.uint8))
    marker = str(processor.image_token)
    made = processor(text=marker, images=[picture], return_tensors="pt")
    own = made["input_ids"][0].tolist()
    if len(own) >= len(tokens):
        raise BackendError(f"a prompt of {len(tokens)} tokens has no room for an image of {len(own)}, and a text")
    token = max(set(own), key=own.count)
    rest = [one - 1 if one == token else one for one in tokens[len(own) :]]
    return {**made, "input_ids": own + rest, "attention_mask": None}
