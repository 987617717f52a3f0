"""`neustream models`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from neustream.analysis.tables import new_table
from neustream.backends.making import make_model
from neustream.backends.sizes import Sizes, sizes_of
from neustream.commands.options import ConfigArgument, JsonOption, QuietOption, SetOption
from neustream.commands.outputs import check_outputs, json_file, json_output
from neustream.commands.printing import console, hushed, notes
from neustream.commands.reach import naming
from neustream.config import Config, Experiment, ModelsConfig, experiments_of, load_config
from neustream.core.profile import LatencyProfile
from neustream.experiment.pipelines import Pipeline, pipeline_of

MOST_BATCHES = 6
"""Batch sizes that a line of the table names."""
TryOption = Annotated[
    str | None,
    typer.Option("--try", metavar="DEVICE", help="Make language models there, and try whether texts are batched."),
]


def command(
    config: ConfigArgument,
    set_: SetOption = None,
    try_: TryOption = None,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Say what a config's model is, and what of it is measured; nothing is served.

    Graph, stages and their largest batches, profiles found and missing with milliseconds a step,
    the KV cache, parameters and memory of the weights by the model's architecture. Without --try
    nothing is loaded.
    """
    with json_output(json_) as write, hushed(quiet), naming(config):
        check_outputs(json_file(json_))
        pipelines = _pipelines(load_config(config, set_ or ()))
        with notes.status("reading the model's architecture"):
            described = [describe(pipeline) for pipeline in pipelines]
        if try_ is not None:
            with notes.status("making the model, and trying how its texts are computed"):
                for model, pipeline in zip(described, pipelines, strict=True):
                    model["texts"] = _texts(pipeline, try_)
        for model in described:
            _show(model)
        write(described)


def _pipelines(config: Config) -> list[Pipeline[Experiment]]:
    """A config's models, with their names as prefixes where there are several."""
    if isinstance(config, ModelsConfig):
        models = config.experiments().items()
        return [pipeline_of(experiment, f"{name}.") for name, experiment in models]
    return [pipeline_of(experiment) for experiment in experiments_of(config)]


def describe(pipeline: Pipeline[Experiment]) -> dict[str, Any]:
    """What is known of a model without loading it, as JSON.

    Raises:
        BackendError: there is no such architecture.
        ProfileError: a profile is malformed; a missing one is said.
    """
    experiment = pipeline.experiment
    sizes = sizes_of(experiment.backend)
    known = isinstance(sizes, Sizes)
    return {
        "name": pipeline.name,
        "kind": pipeline.kind,
        "graph": pipeline.drawn,
        "instances": experiment.instances,
        "stages": _stages(pipeline),
        "kv_caches": _kv_caches(pipeline, sizes),
        "texts": None,
        "weights": _weights(sizes) if known else None,
        "weights_unknown": None if known else sizes,
    }


def _weights(sizes: Sizes | str) -> dict[str, Any]:
    assert isinstance(sizes, Sizes)
    return {
        "model": sizes.model,
        "dtype": sizes.dtype,
        "parameters": sizes.parameters,
        "bytes": sizes.bytes,
        "parts": [asdict(part) for part in sizes.parts],
    }


def _texts(pipeline: Pipeline[Experiment], device: str) -> dict[str, Any] | None:
    """How a language model computes texts; None of other models, and where it does not say."""
    if pipeline.kind != "llm" or pipeline.experiment.backend is None:
        return None
    texts = make_model(pipeline.experiment, device).texts()
    return None if texts is None else asdict(texts)


def _kv_caches(pipeline: Pipeline[Experiment], sizes: Sizes | str) -> list[dict[str, Any]]:
    """The KV cache of each language model; bytes where the architecture tells them."""
    found = []
    for pool in pipeline.pools:
        for model, cache in pool.kv_caches.items():
            each = sizes.kv_bytes if isinstance(sizes, Sizes) else None
            size = None if each is None else each * cache.num_blocks * cache.block_size
            entry = {"blocks": cache.num_blocks, "block_size": cache.block_size, "bytes": size}
            found.append({"model": model, **entry})
    return found


def _stages(pipeline: Pipeline[Experiment]) -> list[dict[str, Any]]:
    """Each stage with its profile, where that is found."""
    files = pipeline.files_by_stage()
    pools = {stage: pool.name for pool in pipeline.pools for stage in pool.stages}
    missing = {stage: [_path(file) for file in files[stage] if not file.exists()] for stage in files}
    profiles = pipeline.load_found()
    stages = []
    for name, stage in pipeline.stages_by_name.items():
        entry = {
            "stage": name,
            "pool": pools[name],
            "max_batch": stage.max_batch,
            "files": [_path(file) for file in files.get(name, ())],
            "missing": missing.get(name, []),
            "device": None,
            "size": pipeline.typical_size(name),
            "latency_s": {},
        }
        if name in profiles:
            entry["device"] = profiles[name].device
            entry["latency_s"] = _latencies(pipeline, name, profiles[name])
        stages.append(entry)
    return stages


def _path(file: Path) -> str:
    return os.path.normpath(file)


def _latencies(pipeline: Pipeline[Experiment], name: str, profile: LatencyProfile) -> dict[str, float]:
    """Seconds of a step by batch size: those that were measured, as far as the stage goes."""
    most = min(pipeline.stages_by_name[name].max_batch, profile.max_batch)
    size = pipeline.typical_size(name)
    return {
        str(batch): profile.latency(batch, batch * size, batch * size * size)
        for batch in pipeline.measured_batches(name, profile, most)
    }


# -- tables -----------------------------------------------------------------------------------------


def _show(model: Mapping[str, Any]) -> None:
    instances = f", {model['instances']} instances" if model["instances"] > 1 else ""
    _say(f"{model['name']}: {model['graph']}{instances}")
    weights = model["weights"]
    if weights is None:
        _say(f"weights: {model['weights_unknown']}")
    else:
        count, size = f"{weights['parameters'] / 1e6:,.1f} M", _size(weights["bytes"])
        _say(f"{weights['model']}, {weights['dtype']}: {count} parameters, {size} of weights")
        console.print(_parts_table(weights["parts"]))
    for cache in model["kv_caches"]:
        tokens = cache["blocks"] * cache["block_size"]
        size = "" if cache["bytes"] is None else f", {_size(cache['bytes'])}"
        blocks = f"{cache['blocks']:,} blocks of {cache['block_size']} tokens"
        _say(f"KV cache of {cache['model']}: {blocks}, {tokens:,} in all{size}")
    if model["texts"] is not None:
        _say(_computed(**model["texts"]))
    console.print(_stages_table(model["stages"]))
    missing = dict.fromkeys(path for stage in model["stages"] for path in stage["missing"])
    for folder in dict.fromkeys(os.path.dirname(path) for path in missing):
        names = ", ".join(Path(path).stem for path in missing if os.path.dirname(path) == folder)
        _say(f"missing in {folder}: {names}; `neustream profile CONFIG --out DIR` measures them")


def _computed(batched: bool, slots: bool, why: str) -> str:
    """How texts are computed, in a line."""
    if slots:
        return "texts: batched, in slots"
    how = "batched, with caches of their own" if batched else "one by one, with caches of their own"
    return f"texts: {how} ({why})"


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _parts_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table("", "part", ["class", "parameters, M", "weights"])
    for part in parts:
        count = f"{part['parameters'] / 1e6:,.1f}"
        table.add_row(part["name"], part["kind"], count, _size(part["bytes"]))
    return table


def _stages_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    devices = {stage["device"] for stage in stages if stage["device"]}
    title = f"profiles of {', '.join(sorted(devices))}" if devices else ""
    headings = ["most", "profile", "batch sizes", "ms, smallest", "largest"]
    if any(stage["size"] for stage in stages):
        headings.insert(3, "tokens")
    table = new_table(title, "stage", headings)
    for stage in stages:
        seconds = list(stage["latency_s"].values())
        ends = [f"{each * 1e3:.2f}" for each in (seconds[0], seconds[-1])] if seconds else ["-"] * 2
        found = "missing" if stage["missing"] else "found"
        cells = [str(stage["max_batch"]), found, _batches(list(stage["latency_s"]))]
        if "tokens" in headings:
            cells.append(f"{stage['size']:,.0f}")
        table.add_row(stage["stage"], *cells, *ends)
    return table


def _batches(sizes: Sequence[str]) -> str:
    """Batch sizes in a few words."""
    if not sizes:
        return "-"
    if len(sizes) <= MOST_BATCHES:
        return " ".join(sizes)
    return f"{sizes[0]} to {sizes[-1]} ({len(sizes)})"
