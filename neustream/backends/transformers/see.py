"""The stage in which a vision tower looks at the images of requests, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from neustream.backends.torch import OUT_OF_MEMORY, sync
from neustream.backends.transformers.eyes import Eyes
from neustream.backends.transformers.measured import fingerprint
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.sight import Sight
from neustream.backends.transformers.text import SEEN, Ask
from neustream.core.batch import StepInput
from neustream.core.graph import Graph, Stage
from neustream.core.job import Job
from neustream.core.profile import GuessedProfile, LatencyProfile, TableProfile, units_of
from neustream.errors import StageFailed
from neustream.profiling.files import Measurement, load_profile, save, usual
from neustream.profiling.measuring import measure, versions

REPEATS = 3
"""Steps of each batch size that are timed when a tower is measured."""


class See:
    """The stream module of a vision tower.

    Args:
        name: of the model's node; its stage is `<name>.see`.
        ask: what a request wants of the model.
    """

    def __init__(self, model: LanguageModel, eyes: Eyes, ask: Callable[[StepInput], Ask], *, name: str) -> None:
        self.model, self.eyes, self.name = model, eyes, name
        self._ask = ask

    def load(self, device: str) -> None:
        """Nothing to do: the model stays on the device that it is on."""

    def step(self, inputs: Sequence[StepInput]) -> list[Mapping[str, Any] | StageFailed]:
        """Look at the images of some requests; StageFailed if somebody changed the model."""
        asks = [(ask.adapter, ask.sight) for given in inputs if (ask := self._ask(given)).sight is not None]
        found: dict[int, torch.Tensor | StageFailed] = {}
        try:
            for adapter in dict.fromkeys([one for one, _ in asks]):
                own = {at: sight for at, (one, sight) in enumerate(asks) if one == adapter and sight is not None}
                with self.model.chosen(adapter):
                    found |= zip(own, self._look(list(own.values())), strict=True)
        finally:
            self.model.check_step()
        each = [found[at] for at in range(len(asks))]
        return [one if isinstance(one, StageFailed) else {f"{self.name}.{SEEN}": one} for one in each]

    def _look(self, sights: Sequence[Sight]) -> list[torch.Tensor | StageFailed]:
        if self.model.fixed is None:
            found: list[torch.Tensor | StageFailed] = self.eyes.look(sights)
            return found
        return [one for sight in sights for one in self.eyes.look([sight])]  # whatever the company


def see_stage(node: str, max_batch: int, unit: float) -> Stage:
    """The stage `<node>.see`. `unit`: image tokens that count as 1 in its profile."""
    return Stage(f"{node}.see", max_batch, size=partial(_size, unit=unit))


def looks(job: Job) -> int:
    """How often a request's images are looked at."""
    ask: Ask = job.params["ask"]
    return 0 if ask.sight is None else 1


def _size(job: Job, unit: float) -> float:
    ask: Ask = job.params["ask"]
    return 0.0 if ask.sight is None else ask.sight.count / unit


def see_profile(
    see: See,
    stage: Stage,
    sample: Ask,
    cache: Path | str | None,
    seconds: float,
) -> LatencyProfile:
    """How long looking takes, by images like that of `sample`: from the cache, or measured and kept there.

    Full steps are timed where one image says that they fit `seconds`; else a step is taken to cost as
    many times that, and the steps that run correct it.
    """
    folder = Path(cache or user_cache_path("neustream")) / "profiles" / fingerprint(see.model)
    assert sample.sight is not None
    path = folder / f"see-{stage.max_batch}-of-{sample.sight.count}-tokens.json"
    if path.exists():
        return units_of(load_profile(path))
    single = measure_see(see, stage, sample, [1])
    once = usual(single[0].seconds, beside=True)
    if once * stage.max_batch * (REPEATS + 1) > seconds:
        sizes = [1] if stage.max_batch == 1 else [1, stage.max_batch]
        return GuessedProfile(TableProfile(stage.name, sizes, [once * size for size in sizes], device=see.model.place))
    found = single + (measure_see(see, stage, sample, [stage.max_batch]) if stage.max_batch > 1 else [])
    name, place = see.model.name, see.model.place
    save({path.stem: found}, folder, model=name, device=place, origin=_origin(see), beside=True)
    return units_of(load_profile(path))


def measure_see(see: See, stage: Stage, sample: Ask, batches: Sequence[int]) -> list[Measurement]:
    """Time steps of so many requests with images like that of `sample`; on the device's own thread."""
    found = measure(
        Graph(stage.name, stage),
        {stage.name: see},
        lambda at: {"ask": sample},
        batches=batches,
        repeats=REPEATS,
        warmup=1,
        sync=partial(sync, see.model.device),
        out_of_memory=OUT_OF_MEMORY,
    )
    return found[stage.name]


def _origin(see: See) -> dict[str, Any]:
    dtype = str(see.model.model.dtype).removeprefix("torch.")
    return {"how": "measured when served", "dtype": dtype, "versions": versions()}
