"""Small trace files in the schemas of public traces, written by the tests; the values are made up."""

from __future__ import annotations

import gzip
import json

from neustream.workload import Trace, Window, take

AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,374,44\r\n"
    "2023-11-16 18:17:04.0319600,396,109\r\n"
    "2023-11-16 18:17:04.0319601,7,1"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 02:00:00.017335+02:00,2399,6\n"
    "2024-05-10T00:00:01Z,76,15\n"
)
AZURE_LMM = (
    "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 12:00:00,0,20,7\n2024-10-15 12:00:02.5,3,900,8\n"
)
BURSTGPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,12,2.5,ChatGPT,472,18,490,Conversation log\n"
    "45.0,,0,GPT-4,310,0,310,API log\n"
    "46,,8,GPT-4,31.0,7,38,API log\n"
)
BURSTGPT_OLD = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "118,GPT-4,20,9,29,API log\n"
)
MOONCAKE = (
    '{"timestamp": 27000, "input_length": 700, "output_length": 500, "hash_ids": [46, 47]}\n'
    '{"timestamp": 27482, "input_length": 90, "output_length": 490, "hash_ids": [46]}\n'
)
GUIDELLM = (
    '{"timestamp": 0, "input_length": 700, "output_length": 500}\n'
    '{"timestamp": 27.25, "input_length": 90, "output_length": 490}\n'
)
VIDUR = ",arrived_at,num_prefill_tokens,num_decode_tokens\n0,0.5,374,44\n1,1e1,396,109\n"
VLLM_OMNI = (
    'Request(prompt="a cat\'s hat", width=512, height=768, num_frames=None, num_inference_steps=20, seed=3, fps=None, '
    "timestamp=1.5, slo_ms=800.0, request_id='a')\n"
    "Request(prompt='a \\'dog\\'', width=1024, height=1024, num_frames=81, num_inference_steps=50, "
    "timestamp=2.25, image_paths=['x.png', 'y.png'])\n"
)
DIFFUSIONDB = (
    "image_name,prompt,part_id,seed,step,cfg,sampler,width,height,user_name,timestamp,image_nsfw,prompt_nsfw\n"
    'a.png,"a cat, sitting",1,2615452550,50,7.0,8,512,704,u,2022-08-08 15:30:00+00:00,0.1,0.0\n'
    "b.png,a dog,1,11,25,12.5,8,512,512,v,2022-08-08 15:31:00+00:00,0.1,0.0\n"
)
CONVERSATIONS = [
    {"id": "a", "conversations": [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four five"}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "one"}]},
    {
        "id": "c",
        "conversations": [
            {"from": "system", "value": "one one"},
            {"from": "human", "value": "six"},
            {"from": "gpt", "value": "one two three four"},
            {"from": "human", "value": "two"},
            {"from": "gpt", "value": "two"},
        ],
    },
]


def put(folder, content, name="trace"):
    """A file with this content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def packed(content):
    return gzip.compress(content.encode(), mtime=0)


def taken(path, format="auto", tokenizer=None, **window):
    return take(Trace(path, format, tokenizer), Window(**window))


def tokenizer(folder):
    """A tokenizer of words, as a tokenizer.json."""
    words = ["[UNK]", "one", "two", "three", "four", "five", "six"]
    model = {"type": "WordLevel", "vocab": {word: at for at, word in enumerate(words)}, "unk_token": "[UNK]"}
    file = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(file))
    return path
