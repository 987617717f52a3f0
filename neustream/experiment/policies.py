"""The policies of an experiment, and who is blamed for what they raise."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neustream.by_name import make_policy, parameters_of, policy_class
from neustream.config.schema import Experiment
from neustream.core.policies import DEFAULT
from neustream.core.policy import Policy
from neustream.core.profile import LatencyProfile
from neustream.errors import ConfigError, NeustreamError, PolicyError, shown, told
from neustream.experiment.pipelines import pipeline_of
from neustream.profiling.files import load_stage


def build_policy(experiment: Experiment, name: str, *, prefix: str = "") -> Policy:
    """The policy `name` (see `make_policy`) with the config's parameters for it.

    Beside them a policy with a parameter `slo_scale` gets the config's `slo.scale`, and the files
    of a `plan` become profiles. `prefix` stands in front of the names of the experiment's stages.
    """
    kind = DEFAULT if name == "default" else name
    given = dict(experiment.policies.get(name) or experiment.policies.get(kind, {}))
    where = f"policies.{name}"
    ready: dict[str, Any] = {}
    if experiment.slo.scale is not None and "slo_scale" not in given:
        ready["slo_scale"] = experiment.slo.scale
    if "plan" in given and "plan" in (parameters_of(policy_class(name)) or ()):
        ready["plan"] = _plan(experiment, prefix, where, given.pop("plan"))
    return make_policy(name, given, where=where, ready=ready)


def _plan(experiment: Experiment, prefix: str, where: str, files: Any) -> dict[str, LatencyProfile]:
    """Profiles that a policy plans with instead of the true ones: stage -> files (without .json)."""
    stages = pipeline_of(experiment).stages
    lists = isinstance(files, dict) and all(isinstance(parts, list) and parts for parts in files.values())
    if not lists or set(files) - set(stages):
        raise ConfigError(
            f"{where}.plan: expected a mapping of stages {sorted(stages)} to lists of files, got {shown(files)}"
        )
    return {
        prefix + name: load_stage(prefix + name, [experiment.profiles / f"{part}.json" for part in parts])
        for name, parts in files.items()
    }


@contextlib.contextmanager
def policy_faults(policy: str | Policy) -> Iterator[None]:
    """What a policy's `decide` raises, or its decision brings about, becomes a PolicyError that says where."""
    try:
        yield
    except NeustreamError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = {frame.name for frame in frames}
        if "next_batch" not in inside:  # not while the policy was asked
            raise
        name = policy if isinstance(policy, str) else type(policy).__name__
        what = "decide raised" if "decide" in inside else "its decision cannot be carried out:"
        where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        raise PolicyError(f"policy {name!r}: {what} {told(error)} ({where})") from error
