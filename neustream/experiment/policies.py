"""Policies and backends by name: imported, given a config's parameters, and blamed for what they raise."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from neustream.config.schema import Experiment
from neustream.core.policies import DEFAULT, POLICIES
from neustream.core.policy import Policy
from neustream.core.profile import LatencyProfile
from neustream.errors import (
    ConfigError,
    NeustreamError,
    PolicyError,
    cut,
    nearest,
    one_line,
    shown,
    told,
)
from neustream.experiment.pipelines import pipeline_of
from neustream.profiling.files import load_stage


def build_policy(experiment: Experiment, name: str, *, prefix: str = "") -> Policy:
    """The policy `name` (one of the library's, "default", or `module:Class`) with the config's parameters for it.

    `prefix` stands in front of the names of the experiment's stages.
    """
    kind = DEFAULT if name == "default" else name
    make = POLICIES.get(kind) or (load_object(name, "policy") if ":" in name else None)
    if make is None:
        hint = f"{nearest(name, [*POLICIES, 'default'])}; or module:Class for one of your own"
        raise ConfigError(f"unknown policy {shown(name)}; {hint}")
    given = dict(experiment.policies.get(name) or experiment.policies.get(kind, {}))
    where = f"policies.{name}"
    known = {field.name: field for field in dataclasses.fields(make)} if dataclasses.is_dataclass(make) else None
    if known is not None:
        hints = typing.get_type_hints(make)
        for key, value in given.items():
            if key not in known:
                raise ConfigError(f"{where}: unknown parameter {shown(key)}; {nearest(key, known)}")
            if key == "plan":
                given[key] = _plan(experiment, prefix, where, value)
            else:
                given[key] = _checked(f"{where}.{key}", hints[key], value)
        if "slo_scale" in known and "slo_scale" not in given and experiment.slo.scale is not None:
            given["slo_scale"] = experiment.slo.scale
    try:
        policy: Policy = make(**given)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: making it raised {told(error)}") from error
    if not callable(getattr(policy, "decide", None)):
        raise ConfigError(f"policy {name!r} makes a {type(policy).__name__}, which has no decide(view)")
    return policy


def _checked(where: str, hint: Any, value: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {error.errors()[0]['msg']}, got {shown(value)}") from None


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


def load_object(path: str, what: str) -> Any:
    """The object at `package.module:name`; ConfigError if it cannot be imported, whatever its module raises."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} {shown(path)}: {cut(one_line(error), 200)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} {path!r}: its module raised {told(error)}") from error


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
