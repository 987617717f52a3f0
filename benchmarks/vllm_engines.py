"""Engines of vLLM for `llm_vllm.py` and `fidelity_vllm.py`: an OPT with dummy weights, by where it runs.

It never ends by itself: a logits processor makes it say EOS where the workload says so, which no scheduler looks at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

EOS = 2
"""The token that ends a generation."""
STOCK, OURS = "fcfs", "ours"


@dataclass(frozen=True)
class Size:
    """A model and what its engine has room for.

    Args:
        opt: what the model's config says of its sizes.
        seats, step_tokens: requests, and tokens of a step, at most.
        block, blocks: tokens of a KV block, and how many there are.
        more: vLLM's engine arguments.
    """

    name: str
    opt: Mapping[str, int]
    dtype: str
    seats: int
    step_tokens: int
    block: int
    blocks: int
    more: Mapping[str, Any] = field(default_factory=dict)


def _opt(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }


GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, *range(8, 65, 8)]}
"""Decodes as CUDA graphs, without torch.compile, which takes a minute for each engine."""
SIZES = {
    "cpu": Size("opt-34m", _opt(8, 512, 8, 8192, 1024), "float32", 16, 512, 32, 192, {"enforce_eager": True}),
    "cuda": Size(
        "opt-1.3b",
        _opt(24, 2048, 32, 50272, 2048),
        "float16",
        64,
        2048,
        16,
        2048,
        {"gpu_memory_utilization": 0.2, "compilation_config": GRAPHS},  # several are in one process
    ),
}
"""By kind of device."""


def size_on(device: str) -> Size:
    """What is served on a device; ends the program if the vLLM that is installed is for another kind."""
    from vllm.platforms import current_platform

    kind, _, index = device.partition(":")
    have = current_platform.device_type
    if kind != have or kind not in SIZES:
        raise SystemExit(f"--device {device}: the vLLM that is installed here runs on {have or 'nothing'}")
    if index not in ("", "0"):
        raise SystemExit(f"--device {device}: vLLM takes the first one that it sees; choose by CUDA_VISIBLE_DEVICES")
    return SIZES[kind]


def make_model(folder: Path, size: Size) -> None:
    """A folder with the config of an OPT; its weights are dummies (all tokens equally likely)."""
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **size.opt,
        "do_layer_norm_before": True,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "torch_dtype": size.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_server(folder: Path, size: Size, kind: str, policy: str = "default") -> Any:
    """An engine under vLLM's scheduler (first come first served, or by priority), or ours with a policy."""
    from vllm import LLM
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Ends(AdapterLogitsProcessor):  # type: ignore[misc]
        """EOS as the output number `end` of a request's `extra_args`, and not before."""

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            end = (params.extra_args or {}).get("end")
            return None if end is None else lambda made, logits: _ending(logits, len(made) + 1 >= end)

    given: dict[str, Any] = {STOCK: {}, "priority": {"scheduling_policy": "priority"}, OURS: {}}[kind]
    if kind == OURS:
        given["scheduler_cls"] = "neustream.backends.vllm.SLOScheduler"
        given["additional_config"] = {"neustream": {"policy": policy}}
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=size.dtype,
        max_model_len=512,
        max_num_seqs=size.seats,
        max_num_batched_tokens=size.step_tokens,
        enable_prefix_caching=False,
        block_size=size.block,
        num_gpu_blocks_override=size.blocks,
        seed=0,
        logits_processors=[Ends],
        **size.more,
        **given,
    )
    return llm.llm_engine


def _ending(logits: Any, over: bool) -> Any:
    if over:
        logits[:] = float("-inf")
    logits[EOS] = 0.0 if over else float("-inf")
    return logits
