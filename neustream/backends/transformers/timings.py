"""How long steps of a language model take, and looks of its vision tower: as given, or measured."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

from neustream.backends.options import measuring
from neustream.backends.transformers.measured import steps_for
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.see import See, see_profile
from neustream.backends.transformers.text import Ask
from neustream.backends.values import check_option, number
from neustream.core.graph import Stage
from neustream.core.profile import LatencyProfile, unmeasured
from neustream.core.steps import StepLatency
from neustream.errors import BackendError
from neustream.profiling.steps import load_steps
from neustream.service.mount import Device


class Timings:
    """Where the profiles of a model come from.

    Args:
        profile, looks, measure_s, cache, progress: see `TextMount`; `looks` is its `see_profile`.

    Raises:
        BackendError: it names the argument that is wrong.
    """

    def __init__(
        self,
        profile: StepLatency | Path | str | None,
        looks: LatencyProfile | None,
        measure_s: float,
        cache: Path | str | None,
        progress: bool | None,
    ) -> None:
        if not hasattr(profile, "seconds"):
            check_option("profile", profile, str | Path | None, "a step profile or its file")
        check_option("cache", cache, str | Path | None, "a folder")
        check_option("progress", progress, bool | None, "True, False or None")
        self._measure_s = number("measure_s", measure_s, "a number above 0", lambda x: 0 < x < math.inf, BackendError)
        self._profile = profile
        self._looks = looks
        self._cache = cache
        self._progress = progress

    def steps(self, model: LanguageModel, device: Device) -> StepLatency:
        """How long steps take: as given, or as measured on the device's own thread."""
        if isinstance(self._profile, str | Path):
            return load_steps(self._profile)
        if self._profile is not None:
            return self._profile
        show = sys.stderr.isatty() if self._progress is None else self._progress
        with measuring(f"measuring {model.name}", show) as tick:
            work = partial(steps_for, model, self._cache, self._measure_s, tick)
            steps: StepLatency = device.executor.call(work).result()
            return steps

    def looks(self, device: Device, see: See, stage: Stage, sample: Ask) -> LatencyProfile:
        """How long looking takes: as given, as measured on the device's own thread, or a guess beside given steps."""
        if self._looks is not None:
            return self._looks
        if self._profile is not None:
            return unmeasured(stage.name, stage.max_batch)
        work = partial(see_profile, see, stage, sample, self._cache, self._measure_s / 4)
        profile: LatencyProfile = device.executor.call(work).result()
        return profile
