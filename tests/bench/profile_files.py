"""Small profiles of each dialect, and what is changed in them."""

from __future__ import annotations

import copy

import pytest
import yaml

from neustream.bench.profiles import Given, read_profile

URL = "REPLACE_ENV_LLMDBENCH_HARNESS_STACK_ENDPOINT_URL"
MODEL = "REPLACE_ENV_LLMDBENCH_DEPLOY_CURRENT_MODEL"
PERF = {
    "load": {"type": "constant", "stages": [{"rate": 20, "duration": 1}, {"rate": 40, "duration": 1}]},
    "api": {"type": "completion", "streaming": True},
    "server": {"type": "vllm", "model_name": MODEL, "base_url": URL, "ignore_eos": True},
    "tokenizer": {"pretrained_model_name_or_path": MODEL},
    "data": {
        "type": "random",
        "input_distribution": {"min": 4, "max": 12, "mean": 8, "std_dev": 2, "total_count": 10},
        "output_distribution": {"min": 2, "max": 6, "mean": 4, "std_dev": 1},
    },
    "report": {"request_lifecycle": {"summary": True, "per_stage": True, "per_request": True}},
    "storage": {"local_storage": {"path": "/somewhere"}},
}
GUIDE = {
    "metadata": {"labels": {"name": "mine"}},
    "spec": {
        "backend": {"kind": "openai_http", "target": URL, "model": MODEL, "request_format": "/v1/completions"},
        "profile": {"kind": "concurrent", "streams": 2},
        "constraints": [{"kind": "max_requests", "count": 6}],
        "data": [{"kind": "synthetic_text", "prompt_tokens": 8, "output_tokens": 4}],
    },
}
VLLM = {
    "executable": "benchmark_serving.py",
    "model": MODEL,
    "base-url": URL,
    "dataset-name": "random",
    "random-input-len": 8,
    "random-output-len": 4,
    "num-prompts": 6,
    "max-concurrency": 2,
    "percentile-metrics": "ttft,tpot",
    "ignore-eos": "none",
}
NOP = {"model_name": MODEL, "pvc_name": "REPLACE_ENV_LLMDBENCH_HARNESS_PVC_NAME"}
FLAT = {
    "target": URL,
    "model": MODEL,
    "request_type": "text_completions",
    "profile": "constant",
    "rate": [1, 2],
    "max_seconds": 3,
    "data": "prompt_tokens=8,output_tokens=4",
}
ALL = {"inference-perf": PERF, "guidellm": GUIDE, "vllm-benchmark": VLLM, "nop": NOP}


def changed(profile, /, **changes):
    """A copy with values at paths, `__` between keys; `...` takes a key out."""
    found = copy.deepcopy(profile)
    for path, value in changes.items():
        *sections, last = path.split("__")
        at = found
        for step in sections:
            at = at[int(step)] if isinstance(at, list) else at.setdefault(step, {})
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return found


def write(folder, profile, name="profile.yaml"):
    """The profile as a file."""
    path = folder / name
    path.write_text(profile if isinstance(profile, str) else yaml.safe_dump(profile))
    return path


@pytest.fixture
def bare(monkeypatch):
    """An environment in which no token stands for anything."""
    for name in ("DEPLOY_CURRENT_MODEL", "DEPLOY_CURRENT_TOKENIZER", "HARNESS_STACK_ENDPOINT_URL"):
        monkeypatch.delenv(f"LLMDBENCH_{name}", raising=False)


def read(folder, profile, *overrides, **given):
    return read_profile(write(folder, profile), Given(overrides=overrides, **given))
