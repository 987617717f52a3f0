"""Tiny vision-language models of real architectures, with processors that need no files."""

from functools import cache

import numpy as np
import torch
import transformers
from PIL import Image
from places import DEVICE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<soi>",
    "<eoi>",
    "<row>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
]
PAD, BOS, EOS, IMAGE, START, END = range(6)
VOCABULARY = len(SPECIAL) + 256
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
CHAT = (
    "{% for message in messages %}{{ message['role'] }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %};{% endfor %}{% if add_generation_prompt %}model:{% endif %}"
)


def tokenizer(image="<image>"):
    """Each byte of UTF-8 is a token, behind the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": image,
            "boi_token": "<soi>",
            "eoi_token": "<eoi>",
            "end_image_token": "<eoi>",
            "start_image_token": "<soi>",
            "context_image_token": "<image>",
            "image_boundary_token": "<soi>",
            "fake_image_token": "<soi>",
            "global_image_token": "<eoi>",
            "row_token": "<row>",
        },
    )


def _llava():
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=IMAGE,
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return config, processor


def _llava_next():
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_grid_pinpoints=pinpoints,
        image_token_index=IMAGE,
    )
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return config, processor


class QwenProcessor(transformers.Qwen2VLProcessor):
    """Without videos: their processor needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.image_token_id = tokenizer.image_token, IMAGE
        self.video_token, self.video_token_id = "<row>", 6
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _qwen_processor(patch):
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32},
    )
    return QwenProcessor(images, tokenizer(), chat_template=CHAT)


QWEN = {"vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": 6}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def _qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE}, vision_config={**vision, "spatial_merge_size": 2}, **QWEN
    )
    return config, _qwen_processor(4)


def _qwen2_5_vl():
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN)
    return config, _qwen_processor(4)


def _gemma3():
    config = transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    template = CHAT.replace("<image>", "<soi>")
    return config, transformers.Gemma3Processor(images, tokenizer(), chat_template=template, image_seq_length=4)


def _idefics2():
    config = transformers.Idefics2Config(
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        vision_config={**VISION, "image_size": 32},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "num_key_value_heads": 1,
            "resampler_head_dim": 16,
        },
        image_token_id=IMAGE,
    )
    images = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False
    )
    processor = transformers.Idefics2Processor(images, tokenizer(), image_seq_len=4, chat_template=CHAT)
    return config, processor


def _idefics3():
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config={**VISION, "image_size": 16},
        scale_factor=2,
        image_token_id=IMAGE,
    )
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    return config, transformers.Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=CHAT)


class SmolProcessor(transformers.SmolVLMProcessor):
    """Without videos: their processor needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_len=4, chat_template=None):
        self.fake_image_token, self.image_token = "<soi>", "<image>"
        self.image_token_id, self.video_token = IMAGE, "<row>"
        self.end_of_utterance_token, self.global_image_token = "<end_of_utterance>", "<eoi>"
        self.image_seq_len = image_seq_len
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _smolvlm():
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={**VISION, "image_size": 16},
        scale_factor=2,
        image_token_id=IMAGE,
    )
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    return config, SmolProcessor(images, tokenizer(), chat_template=CHAT)


def _qwen3_vl():
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = transformers.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN)
    return config, _qwen_processor(4)


def _paligemma():
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        projection_dim=32,
        image_token_index=IMAGE,
    )
    images = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    return config, transformers.PaliGemmaProcessor(images, tokenizer(), chat_template=CHAT)


class InternProcessor(transformers.InternVLProcessor):
    """Without videos: their processor needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=4, chat_template=None):
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = "<soi>", "<eoi>"
        self.image_token, self.image_token_id = "<image>", IMAGE
        self.video_token = "<row>"
        self.multimodal_pattern = "(?P<image><image>)|(?P<video><row>)"
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _internvl():
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={
            **VISION,
            "image_size": [16, 16],
            "patch_size": [4, 4],
            "use_qk_norm": False,
        },
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = transformers.GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=False)
    return config, InternProcessor(images, tokenizer(), chat_template=CHAT)


FAMILIES = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "qwen3_vl": _qwen3_vl,
}


EXACT = [family for family in FAMILIES if family not in ("paligemma", "qwen3_vl")]
MARKERS = {"gemma3": "<soi>"}
"""What stands for an image in a prompt, where that is not `<image>`."""


@cache
def sighted(family, attention="sdpa"):
    """A model and its processor."""
    config, processor = FAMILIES[family]()
    torch.manual_seed(0)
    made = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    model = made.eval().requires_grad_(False).to(DEVICE)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(4)
    model.generation_config.pad_token_id = PAD
    return model, processor


def picture(seed, width=20, height=16):
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(256, size=(height, width, 3), dtype=np.uint8))


def alone(model, processor, text, images, max_tokens, seed=None, **options):
    """What the stock `generate` makes of a prompt on its own: the new tokens."""
    made = processor(text=text, images=images or None, return_tensors="pt")
    if seed is None:
        options["do_sample"] = False
    else:
        torch.manual_seed(seed)
        options = {"do_sample": True, "top_k": 0, **options}
    out = model.generate(**made.to(model.device), max_new_tokens=max_tokens, **options)
    return out[0, made["input_ids"].shape[1] :].tolist()
