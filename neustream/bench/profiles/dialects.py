"""Which tool a profile is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.profile import Dialect
from neustream.errors import ConfigError, nearest

RUN: tuple[Dialect, ...] = get_args(Dialect)
NOT_RUN: Mapping[str, str] = {
    "aiperf": "AIPerf's options; `neustream bench serve` sends such a load",
    "inferencemax": "a fork of vLLM's benchmark with its own server; "
    "where its keys are flags of vllm bench serve, --harness vllm-benchmark runs them",
    "lm-eval": "an evaluation of answers, not of latencies; lm-eval itself asks the server",
    "eval-containers": "an evaluation of agents in containers, not of latencies",
    "priority-mix": "classes of traffic with priorities; `neustream bench serve` mixes them",
}
"""Tools whose profiles are known and not run, and why."""
KEYS: Mapping[str, frozenset[str]] = {
    "priority-mix": frozenset({"trafficClasses"}),
    "lm-eval": frozenset({"tasks", "model_args", "num_fewshot", "lm_eval"}),
    "eval-containers": frozenset({"containers", "image", "evals", "eval", "benchmark_image"}),
    "aiperf": frozenset({"isl", "osl", "request-count", "endpoint-type", "extra-inputs", "url"}),
    "inference-perf": frozenset(
        {"load", "data", "api", "server", "tokenizer", "report", "storage"}
    ),
    "guidellm": frozenset(
        {"benchmarks", "target", "profile", "rate_type", "rate", "max_seconds", "max_requests"}
        | {"request_type", "backend_kwargs", "processor"}
    ),
    "vllm-benchmark": frozenset(
        {"dataset-name", "num-prompts", "executable", "base-url", "max-concurrency", "request-rate"}
        | {"dataset_name", "num_prompts", "base_url", "max_concurrency", "request_rate"}
    ),
    "nop": frozenset({"model_name", "pvc_name"}),
}
"""Keys at the top by which a profile is known; where several are, the tool with most of them."""
SURE: Mapping[str, str] = {"trafficClasses": "priority-mix", "spec": "guidellm"}
"""Keys that no other tool has."""


def dialect_of(path: Path, values: Mapping[str, Any], harness: str | None) -> Dialect:
    """The tool that a profile is for: as told, by the folder of one that is not run, by its keys.

    Raises:
        Unrunnable: its profiles are not run.
        ConfigError: it is none that is known.
    """
    if harness is not None:
        return _known(harness, harness)
    if path.resolve().parent.name in NOT_RUN:
        return _known(path.resolve().parent.name, str(path))
    found = {name: len(keys & values.keys()) for name, keys in KEYS.items()}
    found |= {name: len(values) + 1 for key, name in SURE.items() if key in values}
    best = max(found, key=lambda name: found[name])
    if not found[best]:
        listed = ", ".join(map(str, list(values)[:8])) or "none"
        raise ConfigError(
            f"{path}: no profile of a tool that is known by its keys ({listed}); "
            f"--harness says which it is: {', '.join([*RUN, *NOT_RUN])}"
        )
    return _known(best, str(path))


def _known(name: str, where: str) -> Dialect:
    if why := NOT_RUN.get(name):
        raise Unrunnable(f"{where}: {name} is not run by neustream: {why}")
    for dialect in RUN:
        if name == dialect:
            return dialect
    raise ConfigError(f"--harness {name!r}: {nearest(name, [*RUN, *NOT_RUN])}")
