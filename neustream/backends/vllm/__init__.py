"""An SLO scheduler inside stock vLLM; vLLM engines as stages of larger graphs, and as models.

    vllm serve MODEL --scheduler-cls neustream.backends.vllm.SLOScheduler
    LLM(MODEL, scheduler_cls="neustream.backends.vllm.SLOScheduler")

A request says what it was promised in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`), with
the keys that `slo()` makes. The names here load vLLM when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from neustream.backends.vllm.slo_args import slo

_HOMES = {
    "AsyncSLOScheduler": "scheduler",
    "HonestDrops": "middleware",
    "SLOScheduler": "scheduler",
    "VLLMExecutor": "executor",
    "VLLMMount": "mount",
}

__all__ = ["AsyncSLOScheduler", "HonestDrops", "SLOScheduler", "VLLMExecutor", "VLLMMount", "slo"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
