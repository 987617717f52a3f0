"""The points of the grid, as the YAML files beside this say.

A file is a kind (`images`, `texts`, `both`): the policies that are compared, and groups of points. A
group has a point for each of its `configs`, each combination of what it varies, and each seed.

    configs   files of configs/paper or of the folder configs beside this
    models    in place of configs: several models in one pool, by name
    sweeps    true: the values of the config's own sweeps, one key at a time
    set       keys of all points, as `--set` has them
    vary      keys with lists of values; or a name of yours with named mappings of keys
    sample    so many of the combinations, drawn with this file's seed 0
    bound     true: how much any scheduler could serve is computed too
    hindsight every so many-th point is searched for its best schedule
    quick     so many points, evenly spread, are in the quick subset

Three keys are no keys of configs: `load` is a share of capacity, and sets the rate. `slow` has the
device slowed down: `{factor, lasts, every}` in steps alone, once from the middle of the arrivals on
if there is no `every`. `share` is what a model of several gets of the device's capacity.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from grid.capacity import capacity
from neustream.config import Experiment, Slowdown, load_experiment
from neustream.config.fields import Section
from neustream.experiment import Prepared, merge, pipeline_of, prepare

HERE = Path(__file__).parent
FOLDERS = (HERE.parent.parent / "configs/paper", HERE / "configs")
KINDS = ("images", "texts", "both")
MOST_PHASES = 2000
"""Times in which a device is slow, at most."""

Keys = Mapping[str, Any]
Choice = tuple[str | float, Keys]
"""What a value is called, and the keys that it sets."""


class Slow(Section):
    """Times in which steps take `factor` times as long; the others are in steps alone."""

    factor: float
    lasts: float
    every: float | None = None


class Part(Section):
    """One of several models in a pool."""

    config: str
    share: float = 1.0
    set: dict[str, Any] = Field(default_factory=dict)


class Group(Section):
    """Points of one kind; what the keys mean is said above."""

    name: str
    configs: list[str] = Field(default_factory=list)
    models: dict[str, Part] = Field(default_factory=dict)
    sweeps: bool = False
    set: dict[str, Any] = Field(default_factory=dict)
    vary: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(default_factory=dict)
    seeds: list[int] = Field(default=[0])
    sample: int | None = None
    bound: bool = False
    hindsight: int | None = None
    quick: int = 1


class Grid(Section):
    """A file."""

    policies: list[str]
    groups: list[Group]


@dataclass(frozen=True)
class Point:
    """A workload on a device, for every policy to be tried on.

    `parts` are the models by name; of a single one the name is empty.
    """

    kind: str
    group: str
    condition: Mapping[str, str | float]
    seed: int
    parts: Mapping[str, Experiment]
    bound: bool = False
    hindsight: bool = False
    quick: bool = False

    @property
    def config(self) -> str:
        return " + ".join(experiment.name for experiment in self.parts.values())

    @property
    def bounded(self) -> bool:
        """Whether the library has a bound for it."""
        each = self.parts.values()
        known = all(e.simulation.latency_noise == 0 and e.instances == 1 for e in each)
        return known and len({type(e) for e in each}) == 1 and (self.kind == "images" or len(each) == 1)

    def prepared(self) -> Prepared:
        if list(self.parts) == [""]:
            return prepare(self.parts[""])
        return merge([prepare(part, prefix=f"{name}.") for name, part in self.parts.items()])


@cache
def grid(kind: str) -> Grid:
    """What a file says."""
    return Grid.model_validate(yaml.safe_load((HERE / f"{kind}.yaml").read_text("utf-8")))


def points(kinds: Sequence[str], quick: bool) -> list[Point]:
    """The points of some kinds in their order; `quick`: the subset."""
    every = [point for kind in kinds for group in grid(kind).groups for point in of_group(kind, group, quick)]
    return [point for point in every if point.quick or not quick]


def of_group(kind: str, group: Group, quick: bool = False) -> Iterator[Point]:
    """The points of a group; `quick`: only the subset is built."""
    todo = list(combinations(group))
    chosen = spread(len(todo), group.quick)
    for at, (configs, choices, seed) in enumerate(todo):
        if quick and at not in chosen:
            continue
        keys = {**group.set, **{key: value for _, keys in choices.values() for key, value in keys.items()}}
        searched = group.hindsight is not None and at % group.hindsight == group.hindsight - 1
        yield Point(
            kind,
            group.name,
            {axis: name for axis, (name, _) in choices.items()},
            seed,
            built(configs, keys, seed),
            group.bound,
            searched,
            at in chosen,
        )


def spread(count: int, some: int) -> set[int]:
    """So many places of `count`, evenly spread."""
    return {(2 * at + 1) * count // (2 * some) for at in range(min(some, count))}


Combination = tuple[Mapping[str, Part], Mapping[str, Choice], int]


def combinations(group: Group) -> Iterator[Combination]:
    """Of each point of a group: its models, what is varied, and the seed."""
    models = [group.models] if group.models else [{"": Part(config=name)} for name in group.configs]
    every = [(parts, choices, seed) for seed in group.seeds for parts in models for choices in _choices(group, parts)]
    if group.sample is not None:
        every = random.Random(0).sample(every, group.sample)
    yield from every


def _choices(group: Group, parts: Mapping[str, Part]) -> Iterator[dict[str, Choice]]:
    axes = {axis: list(_named(axis, values)) for axis, values in group.vary.items()}
    swept = _swept(parts[""].config) if group.sweeps else [{}]
    for first in swept:
        for rest in itertools.product(*axes.values()):
            yield {**first, **dict(zip(axes, rest, strict=True))}


def _named(axis: str, values: Sequence[Any] | Mapping[str, Keys]) -> Iterator[Choice]:
    if isinstance(values, Mapping):
        yield from values.items()
        return
    for value in values:
        name = value if isinstance(value, int | float) else json.dumps(value).replace('"', "")
        yield name, {axis: value}


def _swept(config: str) -> Iterator[dict[str, Choice]]:
    """One point for each value of each sweep of a config."""
    for over, sweep in _loaded(config, ()).sweeps.items():
        for value in sweep.values:
            yield {over: (value, {**sweep.at, over: value})}


# -- experiments ------------------------------------------------------------------------------------


def built(parts: Mapping[str, Part], keys: Keys, seed: int) -> dict[str, Experiment]:
    """The experiments of a point, each with requests for as long as the others."""
    whole = sum(part.share for part in parts.values())
    found: dict[str, Experiment] = {}
    for at, (name, part) in enumerate(parts.items()):
        own = {key: value for key, value in keys.items() if not key.startswith("models.")}
        prefix = f"models.{name}."
        own |= part.set | {key.removeprefix(prefix): v for key, v in keys.items() if key.startswith(prefix)}
        found[name] = _experiment(part.config, own, seed + 100 * at, part.share / whole)
    if len(found) == 1:
        return found
    rates = {name: experiment.workload.rate for name, experiment in found.items()}
    requests = sum(experiment.workload.requests for experiment in found.values())
    return {
        name: with_workload(one, requests=max(round(requests * rates[name] / sum(rates.values())), 1))
        for name, one in found.items()
    }


def _experiment(config: str, keys: Keys, seed: int, share: float) -> Experiment:
    known = {key: value for key, value in keys.items() if key not in ("load", "slow")}
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in known.items())
    experiment = with_workload(_loaded(config, overrides), seed=seed)
    if "load" in keys:
        experiment = with_workload(experiment, rate=keys["load"] * share * _capacity(config, overrides))
    if "slow" in keys:
        slowdowns = phases(experiment, Slow.model_validate(keys["slow"]))
        simulation = experiment.simulation.model_copy(update={"slowdowns": slowdowns})
        experiment = experiment.model_copy(update={"simulation": simulation})
    return experiment


@cache
def _loaded(config: str, overrides: tuple[str, ...]) -> Experiment:
    (path,) = (folder / f"{config}.yaml" for folder in FOLDERS if (folder / f"{config}.yaml").exists())
    return load_experiment(path, overrides)


@cache
def _capacity(config: str, overrides: tuple[str, ...]) -> float:
    return capacity(_loaded(config, overrides))


def with_workload(experiment: Experiment, **keys: Any) -> Experiment:
    """The experiment with other values of its workload."""
    return experiment.model_copy(update={"workload": experiment.workload.model_copy(update=keys)})


def phases(experiment: Experiment, slow: Slow) -> list[Slowdown]:
    """When the device is slow: from the middle of the arrivals on, or time and again."""
    pipeline = pipeline_of(experiment)
    profile = pipeline.load_profiles()[pipeline.main_stage]
    alone = profile.latency(1, pipeline.typical_size(pipeline.main_stage))
    arrivals = [request.arrival for request in prepare(experiment).requests]
    lasts = slow.lasts * alone
    if slow.every is None:
        return [Slowdown(start_s=arrivals[len(arrivals) // 2], duration_s=lasts, factor=slow.factor)]
    apart = slow.every * alone
    count = min(int(1.2 * arrivals[-1] / apart) + 1, MOST_PHASES)
    return [Slowdown(start_s=at * apart, duration_s=lasts, factor=slow.factor) for at in range(count)]
