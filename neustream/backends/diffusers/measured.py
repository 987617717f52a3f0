"""The latency profiles of a served pipeline: given, found in the user's cache, or measured and kept there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from platformdirs import user_cache_path

from neustream.backends.diffusers.parts import execution_device, models_of
from neustream.backends.torch import OUT_OF_MEMORY, device_name, sync
from neustream.core.events import Corrected
from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile, TableProfile, UnitProfile
from neustream.engine.events import Record
from neustream.engine.executor import StreamModule
from neustream.errors import ProfileError
from neustream.profiling.files import Measurement, load_profile, save
from neustream.profiling.measuring import default_batches, go_through, measure, versions

log = logging.getLogger("neustream")

OFF = 0.2
"""A measured profile that is off by more than this share is warned about."""
REPEATS = 5
WARMUP = 1
LOOPED_STEPS = 25
ONCE_STEPS = 2
"""Sample requests take LOOPED_STEPS steps when a looped stage is timed, else ONCE_STEPS."""


class ProfileCache:
    """Where the profiles of one pipeline come from.

    Args:
        given: profiles by stage or by what stages do ("encode", "denoise", "decode", whatever the
            shape), or the folder of profile files by stage; None: the cache, or measure.
        options: what latencies depend on beside the model and the machine (compiled, padded).
        cache: the folder of the cache, default: the user's.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        given: Mapping[str, LatencyProfile] | Path | str | None,
        options: Mapping[str, Any],
        cache: Path | str | None = None,
    ) -> None:
        self._pipe = pipe
        self._options = dict(options)
        self._given = Path(given) if isinstance(given, str) else given
        self._cache = Path(cache or user_cache_path("neustream")) / "profiles" / fingerprint(pipe, options)

    def find(self, stages: Mapping[str, str]) -> dict[str, LatencyProfile] | None:
        """Profiles by stage; `stages` maps stage names to file names. None if they have to be measured."""
        if isinstance(self._given, Mapping):
            keys = {stage: stage if stage in self._given else role_in(name) for stage, name in stages.items()}
            if missing := [stage for stage, key in keys.items() if key not in self._given]:
                raise ProfileError(f"no profile for stage(s) {missing}; given: {sorted(self._given)}")
            return {stage: _units(self._given[key]) for stage, key in keys.items()}
        folder = self._given or self._cache
        paths = {stage: folder / f"{name}.json" for stage, name in stages.items()}
        if self._given is None and not all(path.exists() for path in paths.values()):
            return None
        return {stage: _units(load_profile(path)) for stage, path in paths.items()}

    def known(self, stage: str, file: str) -> LatencyProfile | None:
        """The profile of a stage that others run, if there is one."""
        if isinstance(self._given, Mapping):
            found = self._given.get(stage, self._given.get(role_in(file)))
            return None if found is None else _units(found)
        path = (self._given or self._cache) / f"{file}.json"
        return _units(load_profile(path)) if path.exists() else None

    def keep(
        self, measured: Mapping[str, list[Measurement]], files: Mapping[str, str], out: Path | str | None = None
    ) -> None:
        """Write what was measured while it is served into the cache, or to `out` what was measured alone."""
        named = {files[stage]: some for stage, some in measured.items()}
        weight = next(next(models_of(self._pipe))[1].parameters())
        origin = {
            "how": "measured when served",
            "dtype": str(weight.dtype).removeprefix("torch."),
            "versions": versions(),
        }
        name, place = type(self._pipe).__name__, place_of(self._pipe)
        save(named, out or self._cache, model=name, device=place, origin=origin, beside=out is None)


class Doubts:
    """An observer that warns of measured profiles that are off, once a stage.

    Args:
        measured: whether a stage's profile was measured; guesses are off, and nobody is to care.
    """

    def __init__(self, measured: Callable[[str], bool]) -> None:
        self._measured = measured
        self._told: set[str] = set()

    def __call__(self, record: Record) -> None:
        if not isinstance(record, Corrected) or record.stage in self._told:
            return
        off = max(record.factors.values(), key=lambda factor: abs(factor - 1))
        if abs(off - 1) > OFF and self._measured(record.stage):
            self._told.add(record.stage)
            log.warning(
                "steps of %r take %.2f times what its profile says: corrected from now on; "
                "measure it again with `neustream profile`, or delete it from the cache",
                record.stage,
                off,
            )


def role_in(name: str) -> str:
    """What a stage does, by the name of its profile's file."""
    return name.partition("@")[0]


def _units(profile: LatencyProfile) -> LatencyProfile:
    return UnitProfile(profile) if isinstance(profile, TableProfile) else profile


def place_of(pipe: DiffusionPipeline) -> str:
    """What profiles of a pipeline are labelled with: the device that it runs on."""
    return device_name(execution_device(pipe))


def fingerprint(pipe: DiffusionPipeline, options: Mapping[str, Any]) -> str:
    """A name for all that latencies depend on: architectures, dtypes, the device, versions, options."""
    models = {}
    for name, model in models_of(pipe):
        weight = next(model.parameters(), None)
        config = getattr(model, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        models[name] = (type(model).__name__, str(None if weight is None else weight.dtype), config)
    facts = (type(pipe).__name__, models, place_of(pipe), versions(), dict(options))
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"{type(pipe).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def timed(
    graph: Graph,
    modules: Mapping[str, StreamModule],
    sample: Callable[[int], Mapping[str, Any]],
    device: torch.device,
    lacking: Sequence[str] = (),
    *,
    seconds: float,
    tick: Callable[[str, int, float], None] = lambda stage, batch, seconds: None,
) -> dict[str, list[Measurement]]:
    """Time each stage of a pipeline but those that are `lacking` over its batch sizes, in about `seconds` in all.

    `sample` gives the parameters of a request of so many denoising steps: stages in a loop are
    timed with long requests, the others with short ones. Larger batches are left out where they
    would take longer than `seconds`, by what one request takes.
    """
    out: dict[str, list[Measurement]] = {}
    here = {name: stage for name, stage in graph.stages.items() if name not in lacking}
    if not lacking:
        go_through(graph, modules, sample(ONCE_STEPS), device=str(device), out_of_memory=OUT_OF_MEMORY)
    for name, stage in here.items():
        params = sample(LOOPED_STEPS if name in graph.looped else ONCE_STEPS)
        run = partial(
            measure,
            graph,
            modules,
            partial(_always, params),
            stages=[name],
            warmup=WARMUP,
            sync=partial(sync, device),
            tick=tick,
            out_of_memory=OUT_OF_MEMORY,
        )
        each = run(batches=[1], repeats=2)[name][0].median * (REPEATS + WARMUP)
        left = seconds / len(here)
        batches: list[int] = []
        for batch in default_batches(stage.max_batch):
            left -= each * batch
            if batches and left < 0:
                break
            batches.append(batch)
        out |= run(batches=batches, repeats=REPEATS)
    return out


def _always(params: Mapping[str, Any], at: int) -> Mapping[str, Any]:
    return params
