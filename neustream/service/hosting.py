"""What a service does for its mounts, apart from itself: nobody notices else that it is forgotten."""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from neustream.core.profile import LatencyProfile
from neustream.core.stage_names import named
from neustream.engine.engine import Engine
from neustream.engine.executor import ThreadExecutor
from neustream.service.mount import Device, Instance

if TYPE_CHECKING:
    from neustream.service.service import Service

log = logging.getLogger("neustream")

Profiles = dict[str, LatencyProfile]
POOL = "device"
"""The pool of each device: one worker, with the stages of all models that are there."""
PATIENCE_S = 60.0
"""Seconds that whoever wants a model waits for a forgotten service that still serves what is open."""


class Hosting:
    """A `Host`. Models keep it; it keeps no service.

    `stages`: names of those that are served; None: all.

    Attributes:
        engine: what serves, from the moment it does; ended: set once models are the caller's again.
    """

    engine: Engine

    def __init__(self, devices: Sequence[Device], stages: Sequence[str] | None = None) -> None:
        self._devices = devices
        self._stages = stages
        self._service: weakref.ref[Service] | None = None
        self.ended = threading.Event()

    def begin(self, service: Service) -> None:
        """It serves from now on."""
        self._service = weakref.ref(service)

    def extend(self, instances: Mapping[str, Instance]) -> None:
        """See `Host`."""
        for device in self._devices:
            instance = instances.get(device.name)
            if instance is not None:
                device.executor.add(instance.modules, check_finite=instance.check_finite)
                here, away = parted(instance, self._stages)
                self.engine.add(POOL, here, device.name, away=away)

    def retire(self, stages: Mapping[str, Sequence[str]]) -> None:
        """See `Host`."""
        for device in self._devices:
            if device.name in stages:
                gone = self.engine.retire(POOL, stages[device.name], device.name)
                gone.add_done_callback(Gone(device.executor, stages[device.name]))

    def make_way(self) -> None:
        """See `Host`."""
        if self._service is None:  # it is only being made
            return
        service = self._service()
        if service is None:
            self.ended.wait(PATIENCE_S)
        elif typed_in():
            log.warning("its model is served anew: the service that had it before is closed")
            service.close(cancel=True)


def parted(instance: Instance, stages: Sequence[str] | None) -> tuple[Profiles, Profiles]:
    """The profiles of an instance's stages that are served, by their names, and of those that are not."""
    here = {name: profile for name, profile in instance.profiles.items() if name in instance.own or named(name, stages)}
    return here, {name: profile for name, profile in instance.profiles.items() if name not in here}


class Gone:
    """Forgets the modules of stages, once the scheduler has forgotten those."""

    def __init__(self, executor: ThreadExecutor, stages: Sequence[str]) -> None:
        self._executor, self._stages = executor, stages

    def __call__(self, done: Future[None]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._executor.remove(self._stages)


def typed_in() -> bool:
    """Whether a person types: at a prompt, or in a notebook, whose cells run again and again."""
    if hasattr(sys, "ps1"):
        return True
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("neustream."):
        frame = frame.f_back
    return "__file__" not in frame.f_globals
