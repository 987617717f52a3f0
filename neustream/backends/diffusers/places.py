"""One pipeline on the devices of a service: a replica on each, and the profiles that are known there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline

from neustream.backends.copies import copies
from neustream.backends.diffusers.lacking import is_lacking
from neustream.backends.diffusers.measured import ProfileCache
from neustream.backends.diffusers.partly import moved
from neustream.backends.diffusers.parts import models_of
from neustream.backends.diffusers.replica import Dimensions, ProbeModule, Replica, Sample
from neustream.backends.diffusers.request import StockCall, without_side_effects
from neustream.backends.diffusers.shapes import Shape, from_nothing, predicted
from neustream.backends.options import measuring
from neustream.core.profile import GuessedProfile, LatencyProfile, TableProfile, unmeasured
from neustream.profiling.files import Measurement
from neustream.service.mount import Device, Host, Instance

log = logging.getLogger("neustream")

PROBE_S = 0.02
"""Seconds that probing a request is taken to need, until one was seen."""


class Places:
    """Opens the stages of shapes on all devices, measured, found or guessed.

    Args:
        make: a replica of the pipeline on its device.
        cache: where the profiles of such a replica come from.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        devices: Sequence[Device],
        host: Host,
        make: Callable[[DiffusionPipeline], Replica],
        cache: Callable[[DiffusionPipeline], ProfileCache],
    ) -> None:
        self.devices = list(devices)
        self._kind = type(pipe).__name__
        self._host = host
        pipes = copies(pipe, [device.place for device in devices], _here, moved)
        self.replicas = [make(one) for one in pipes]
        for other in self.replicas[1:]:
            other.states += self.replicas[0].states
        self._known: dict[str, ProfileCache] = {}  # by the place that they are of
        for replica in self.replicas:
            if replica.place not in self._known:
                self._known[replica.place] = cache(replica.pipe)

    @property
    def first(self) -> Replica:
        """The pipeline itself."""
        return self.replicas[0]

    @property
    def refused(self) -> str:
        """Why calls are refused that were taken before, by what one of them would do; empty: they are not."""
        return next(filter(None, (replica.parts.writing.refused for replica in self.replicas)), "")

    def probes(self, name: str, roles: frozenset[str]) -> list[Instance]:
        """The stage at which requests show their dimensions, on each device. `roles`: of those that come."""
        return [
            Instance(
                {name: ProbeModule(replica)},
                {name: GuessedProfile(TableProfile("probe", [1], [PROBE_S], device=replica.place))},
                own=frozenset({name}),
                roles=roles,
            )
            for replica in self.replicas
        ]

    def dimensions(self, asked: StockCall) -> Dimensions:
        """What a call shows of itself, before anybody is served."""
        probe = partial(self.first.probe, without_side_effects(asked.named, asked.whole))
        found: Dimensions = self.devices[0].executor.call(probe).result()
        return found

    def measure(self, shape: Shape, asked: StockCall, seconds: float, show: bool) -> list[Instance]:
        """Instances of a shape with profiles that are found, or measured in about `seconds` each."""
        found: dict[str, Mapping[str, LatencyProfile]] = {}
        for replica, device in zip(self.replicas, self.devices, strict=True):
            if replica.place not in found:
                found[replica.place] = self._measured(replica, device, shape, asked, seconds, show)
        shape.measured = shape.profiles = found[self.first.place]
        return [_instance(replica, shape, found[replica.place]) for replica in self.replicas]

    def _measured(
        self, replica: Replica, device: Device, shape: Shape, asked: StockCall, seconds: float, show: bool
    ) -> Mapping[str, LatencyProfile]:
        """Profiles of a shape by role; where they are found, it is only loaded and warmed up."""
        sample = Sample(asked.named, asked.whole, asked.steps, shape.rows, shape.samples)
        if (found := self._found(replica, shape)) is not None:
            device.executor.call(partial(replica.warm, sample)).result()
            return found
        with measuring(f"measuring {self._kind} {shape.graph.name}", show) as tick:
            roles = {stage: role for role, stage in shape.stages.items()}
            work = partial(replica.time, shape.graph, roles, sample, seconds=seconds, tick=tick)
            self._known[replica.place].keep(device.executor.call(work).result(), shape.files)
        measured = self._found(replica, shape)
        assert measured is not None
        return measured

    def _found(self, replica: Replica, shape: Shape) -> Mapping[str, LatencyProfile] | None:
        """Profiles of a shape by role; of what is not run here those that are known, or guesses."""
        cache, lacking = self._known[replica.place], replica.parts.lacking
        files = {stage: shape.files[stage] for role, stage in shape.stages.items() if role not in lacking}
        found = cache.find(files)
        if found is None:
            return None
        for role, stage in shape.stages.items():
            if role in lacking:
                guess = unmeasured(role, shape.graph.stages[stage].max_batch)
                found[stage] = cache.known(stage, shape.files[stage]) or guess
        return {role: found[stage] for role, stage in shape.stages.items()}

    def open(self, shape: Shape, near: Shape | None, batches: Mapping[str, int]) -> None:
        """Serve a shape from now on, with profiles that are found, or predicted from those of `near`."""
        instances = {}
        for replica, device in zip(self.replicas, self.devices, strict=True):
            profiles = self._found(replica, shape)
            if profiles is not None:
                shape.measured = profiles
            elif near is None:
                profiles = from_nothing(shape, batches)
            else:
                what = self._kind, shape.graph.name, near.dimensions.label
                log.info("%s %s: profiles predicted from those of %s", *what)
                profiles = predicted(near, shape)
            instances[device.name] = _instance(replica, shape, profiles)
            shape.profiles = shape.profiles or profiles
        self._host.extend(instances)

    def retire(self, shape: Shape) -> None:
        """Serve a shape no more."""
        for replica in self.replicas:
            for stage in shape.all_stages:
                replica.roles.pop(stage, None)
        self._host.retire({device.name: shape.all_stages for device in self.devices})

    def keep(self, shape: Shape, measured: Mapping[str, list[Measurement]]) -> None:
        """Steps of a shape were timed: its profiles from now on, and for the next time."""
        self._known[self.first.place].keep(measured, shape.files)
        found = self._found(self.first, shape)
        if found is not None:
            shape.measured = shape.profiles = found


def _instance(replica: Replica, shape: Shape, profiles: Mapping[str, LatencyProfile]) -> Instance:
    """A shape's stages on one device."""
    replica.roles.update({stage: role for role, stage in shape.stages.items()})
    modules: dict[str, Any] = dict.fromkeys(shape.stages.values(), replica.module)
    return Instance(modules, {shape.stages[role]: profiles[role] for role in shape.stages})


def _here(pipe: DiffusionPipeline) -> list[Any]:
    """The models of a pipeline that are here."""
    return [model for _, model in models_of(pipe) if not is_lacking(model)]
