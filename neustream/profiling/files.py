"""Latency profiles as files: read and written, with where their numbers come from.

A file holds one stage of one model on one device, with where its numbers come from:

    {"format": "neustream.profile/1", "kind": "table", "stage": "unet", "model": "SD 1.5, 512 px",
     "device": "NVIDIA H100", "batch": [1, 2, 4], "latency_s": [0.026, 0.031, 0.049],
     "origin": {...}}

or `"kind": "linear"` with `base_s, per_job_s, per_size_s, per_square_s, max_batch`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from neustream.core.profile import LatencyProfile, LinearProfile, SumProfile, TableProfile
from neustream.engine.executor import BRIEF_S
from neustream.errors import ProfileError, cut, shown

FORMAT: Literal["neustream.profile/1"] = "neustream.profile/1"


Name = Annotated[str, Field(max_length=200)]
LargestBatch = Annotated[int, Field(le=2**20)]
Latency = Annotated[float, Field(gt=0, le=1e6)]
"""Seconds of a step."""
Coefficient = Annotated[float, Field(ge=-1e6, le=1e6)]
"""Seconds of a step, or more of them for each unit of its size."""

WaySeconds = Annotated[float, Field(ge=0, le=1e6)]


class EngineCosts(BaseModel):
    """What serving adds to steps, in seconds, as measured on the engine.

    `handover_s`: from the end of a step to the start of the next, where that is planned already;
    `decision_s`: what the default policy takes to decide, whatever there is to be decided;
    `decision_request_s`: more of it for each request that it is asked about, none where a step stands as
    decided before; `decision_new_s`: more for each of these that has not run. `alone_s`: shorter steps are decided one
    after the other, longer ones beside the step before. `call_s`: what the call for a request
    takes in the serving process, before it is taken in. `latency_scale`: how many times its profile
    a served step takes, 1 or more. `load_s`: until the model is there and can be served, its
    libraries and its weights included; a new instance of a cluster takes so long. `there_s`,
    `back_s`: on a cluster, from the call for a request to the queues of an instance, and from the end
    of its last step to its answer: quantiles in equal distances; none: not measured.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    handover_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    decision_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    decision_request_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    decision_new_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    alone_s: Annotated[float, Field(ge=0, le=1e6)] = BRIEF_S
    call_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    latency_scale: Annotated[float, Field(ge=1, le=1e6)] = 1.0
    load_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    there_s: Annotated[tuple[WaySeconds, ...], Field(max_length=1000)] = ()
    back_s: Annotated[tuple[WaySeconds, ...], Field(max_length=1000)] = ()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["neustream.profile/1"]
    stage: Name
    model: Name = ""
    device: Name
    origin: dict[str, Any]
    engine: EngineCosts | None = None


class TableFile(_File):
    """Latencies at measured batch sizes; `p90_s` and `spread` (IQR over median) tell the noise."""

    kind: Literal["table"]
    batch: list[LargestBatch]
    latency_s: list[Latency]
    p90_s: list[float] | None = None
    spread: list[float] | None = None


class LinearFile(_File):
    """Coefficients of a fit."""

    kind: Literal["linear"]
    base_s: Coefficient
    per_job_s: Coefficient = 0.0
    per_size_s: Coefficient = 0.0
    per_square_s: Coefficient = 0.0
    max_batch: LargestBatch


_FILES: TypeAdapter[TableFile | LinearFile] = TypeAdapter(
    Annotated[TableFile | LinearFile, Field(discriminator="kind")]
)


def load_profile(path: Path | str) -> LatencyProfile:
    """Read one profile file; ProfileError names the file and what is wrong with it."""
    return read_profile(Path(path), _FILES.validate_json, _profile, "profile")


File = TypeVar("File")
Read = TypeVar("Read")


def read_profile(path: Path, parse: Callable[[bytes], File], make: Callable[[File], Read], what: str) -> Read:
    """What `make` makes of a file that pydantic's `parse` reads; ProfileError names the file and the fault."""
    name = cut(str(path), 300)
    try:
        return make(parse(path.read_bytes()))
    except FileNotFoundError:
        raise ProfileError(f"no {what} at {name}; `neustream profile CONFIG --out DIR` measures one") from None
    except OSError as error:
        raise ProfileError(f"{name}: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"] if part not in ("table", "linear")) or "the file"
        value = problem["input"]
        got = "" if isinstance(value, dict | bytes) else f", got {shown(value)}"
        raise ProfileError(f"{name}: {where}: {cut(problem['msg'], 200)}{got}") from None
    except ProfileError as error:
        raise ProfileError(f"{name}: {error}") from None


def _profile(file: TableFile | LinearFile) -> LatencyProfile:
    if isinstance(file, TableFile):
        return TableProfile(file.stage, file.batch, file.latency_s, device=file.device)
    return LinearProfile(
        file.stage,
        base=file.base_s,
        per_job=file.per_job_s,
        per_size=file.per_size_s,
        per_square=file.per_square_s,
        max_batch=file.max_batch,
        device=file.device,
    )


class _Costs(BaseModel):
    """A profile file of whatever kind, of which its costs are read alone."""

    engine: EngineCosts = EngineCosts()


def load_costs(paths: Sequence[Path]) -> EngineCosts:
    """What serving adds to the steps of these profiles: the least that one of them says; to load, the most.

    Nothing where there are none, as of an agent that only calls tools.

    Raises:
        ProfileError: a file is missing or malformed.
    """
    if not paths:
        return EngineCosts()
    costs = [read_profile(path, _Costs.model_validate_json, lambda file: file.engine, "profile") for path in paths]
    return EngineCosts(
        handover_s=min(cost.handover_s for cost in costs),
        decision_s=min(cost.decision_s for cost in costs),
        decision_request_s=min(cost.decision_request_s for cost in costs),
        decision_new_s=min(cost.decision_new_s for cost in costs),
        alone_s=min(cost.alone_s for cost in costs),
        call_s=min(cost.call_s for cost in costs),
        latency_scale=min(cost.latency_scale for cost in costs),
        load_s=max(cost.load_s for cost in costs),
        there_s=min((cost.there_s for cost in costs), key=sum),
        back_s=min((cost.back_s for cost in costs), key=sum),
    )


def add_costs(paths: Sequence[Path], costs: Mapping[str, Any]) -> None:
    """Have profile files say more of what serving adds to steps; the rest of them stays.

    `costs`: by the names of `EngineCosts`.
    """
    for path in paths:
        raw = json.loads(path.read_text("utf-8"))
        known = EngineCosts.model_validate(raw.get("engine") or {}).model_dump()
        raw["engine"] = EngineCosts.model_validate({**known, **costs}).model_dump()
        path.write_text(json.dumps(raw, indent=1) + "\n")


def load_stage(stage: str, paths: Sequence[Path | str]) -> LatencyProfile:
    """The profile of a stage that runs one module, or several back to back."""
    parts = [load_profile(path) for path in paths]
    return parts[0] if len(parts) == 1 else SumProfile(stage, parts)


BESIDE = 1.25
"""What a step takes counts as at most so many times the least that it was seen to take, where others may run."""
STATISTIC = {
    False: "median of wall seconds per step",
    True: f"median of wall seconds per step, at most {BESIDE:g} times the least",
}
"""How a profile file calls what it has of a step's repeats."""


def usual(seconds: Sequence[float], *, beside: bool = False) -> float:
    """What a step takes, of what its repeats took: the median.

    `beside`: other programs may run on the machine, as while a server opens, and hold up steps. Then it
    is at most `BESIDE` times the least: a profile that says too much has promises refused that could be
    kept, and nothing runs that would correct it.
    """
    middle = statistics.median(seconds)
    return min(middle, BESIDE * min(seconds)) if beside else middle


@dataclass(frozen=True)
class Measurement:
    """Timings of one stage at one batch size, in seconds."""

    stage: str
    batch: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p90(self) -> float:
        return float(np.percentile(self.seconds, 90))

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low) / self.median


def save(
    measured: Mapping[str, Sequence[Measurement]],
    out: Path | str,
    *,
    model: str,
    device: str,
    origin: Mapping[str, Any],
    engine: EngineCosts | None = None,
    beside: bool = False,
) -> list[Path]:
    """Write one file per stage under `out`; returns their paths. `beside`: see `usual`.

    ProfileError, before any is written, for a stage without a measurement or a run of one.
    """
    for name, some in measured.items():
        if not some or not some[0].seconds:
            raise ProfileError(f"stage {name!r}: there is nothing to write, it was measured at no batch size")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, some in measured.items():
        file = TableFile(
            format=FORMAT,
            kind="table",
            stage=name,
            model=model,
            device=device,
            batch=[m.batch for m in some],
            latency_s=[usual(m.seconds, beside=beside) for m in some],
            p90_s=[m.p90 for m in some],
            spread=[m.spread for m in some],
            engine=engine,
            origin={**origin, "repeats": len(some[0].seconds), "statistic": STATISTIC[beside]},
        )
        paths.append(out / f"{name}.json")
        paths[-1].write_text(json.dumps(file.model_dump(exclude_none=True), indent=1) + "\n")
    return paths
