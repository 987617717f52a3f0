"""Profiles of LLM steps as files, and how they are made from measurements.

A file holds the steps of one model on one device, with where its numbers come from:

    {"format": "neustream.profile/1", "kind": "steps", "stage": "llm", "model": "facebook/opt-13b",
     "device": "NVIDIA RTX A6000", "mixed": 1.0, "sequential": false,
     "prefill": {"tokens": [32, 64], "latency_s": [0.044, 0.046], "fit": [0.0135, 2.5e-4, 0]},
     "decode": {"batch": [1, 8], "context": [64, 512], "latency_s": [[...], [...]], "fit": [...]},
     "origin": {...}}

`fit` continues a table outside of what was measured: base, per token and per squared token of a
prefill; base, per request and per token of context of a decode. A decode may be its fit alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from neustream.core.profile import LatencyProfile, LinearProfile
from neustream.core.steps import DecodeGrid, PrefillTable, Step, StepProfile
from neustream.errors import ProfileError
from neustream.profiling.files import FORMAT, Coefficient, EngineCosts, LargestBatch, Latency, Name, read_profile, usual

ANY_BATCH = 2**20
"""Step profiles limit no batch: memory and `Stage.max_batch` do."""

Tokens = Annotated[int, Field(ge=1, le=2**24)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PrefillPart(_Strict):
    """Latencies of prefills by tokens in the step."""

    tokens: list[Tokens]
    latency_s: list[Latency]
    fit: tuple[Coefficient, Coefficient, Coefficient]


class DecodePart(_Strict):
    """Latencies of decodes, a row for each batch and a column for each context per request; or the fit alone."""

    batch: list[LargestBatch] | None = None
    context: list[Tokens] | None = None
    latency_s: list[list[Latency]] | None = None
    fit: tuple[Coefficient, Coefficient, Coefficient]

    @model_validator(mode="after")
    def _whole(self) -> DecodePart:
        if len({part is None for part in (self.batch, self.context, self.latency_s)}) > 1:
            raise ValueError("batch, context and latency_s of a decode go together, or not at all")
        return self


class StepsFile(_Strict):
    """One model's steps; `error` holds the fits' relative errors where they are known.

    `sequential`: mixed steps cost the sum of their prefill and their decode, times `mixed` (see `StepProfile`).
    """

    format: Literal["neustream.profile/1"]
    kind: Literal["steps"]
    stage: Name
    model: Name = ""
    device: Name
    prefill: PrefillPart
    decode: DecodePart
    mixed: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    sequential: bool = False
    error: dict[str, float] = {}
    engine: EngineCosts | None = None
    origin: dict[str, Any]


def load_steps(path: Path | str) -> StepProfile:
    """Read one file of steps; ProfileError names the file and what is wrong with it."""
    return read_profile(Path(path), StepsFile.model_validate_json, steps_of, "step profile")


def steps_of(file: StepsFile) -> StepProfile:
    """The profile that a file describes."""
    if not file.mixed > 0:
        raise ProfileError(f"profile {file.stage!r}: mixed must be greater than 0, got {file.mixed}")
    prefill = PrefillTable(
        f"{file.stage}.prefill", file.prefill.tokens, file.prefill.latency_s, file.prefill.fit, device=file.device
    )
    part = file.decode
    name = f"{file.stage}.decode"
    decode: LatencyProfile
    if part.batch is None or part.context is None or part.latency_s is None:
        base, per_job, per_token = part.fit
        decode = LinearProfile(
            name, base=base, per_job=per_job, per_size=per_token, max_batch=ANY_BATCH, device=file.device
        )
    else:
        decode = DecodeGrid(name, part.batch, part.context, part.latency_s, part.fit, device=file.device)
    return StepProfile(file.stage, prefill, decode, mixed=file.mixed, sequential=file.sequential, device=file.device)


Timed = tuple[Step, Sequence[float]]
"""One kind of step, and the seconds that its repeats took."""


def steps_file(
    timed: Sequence[Timed],
    *,
    model: str,
    device: str,
    origin: Mapping[str, Any],
    stage: str = "llm",
    beside: bool = False,
) -> StepsFile:
    """A file from measured steps: prefills alone, decodes alone on a full grid, and mixed ones.

    A prefill of several prompts counts by its tokens; where several were measured at as many tokens,
    the table has their median. `beside`: see `usual`. ProfileError names what is missing.
    """
    medians = [(step, usual(seconds, beside=beside)) for step, seconds in timed]
    prefill, prefill_error = _prefill([(s, x) for s, x in medians if s.prefills and not s.decodes])
    decode, decode_error = _decode([(s, x) for s, x in medians if s.decodes and not s.prefills])
    file = StepsFile(
        format=FORMAT,
        kind="steps",
        stage=stage,
        model=model,
        device=device,
        prefill=prefill,
        decode=decode,
        error={"prefill_fit": prefill_error, "decode_fit": decode_error},
        origin=dict(origin),
    )
    if mixed := [(s, x) for s, x in medians if s.prefills and s.decodes]:
        told = [(*_mixed(file, sequential, mixed), sequential) for sequential in (False, True)]
        file.error["mixed"], file.mixed, file.sequential = min(told)
    return file


def _mixed(file: StepsFile, sequential: bool, timed: Sequence[tuple[Step, float]]) -> tuple[float, float]:
    """The median relative error of a model of mixed steps, and the factor that it needs."""
    model = steps_of(file.model_copy(update={"sequential": sequential}))
    ratios = [seconds / model.seconds(step) for step, seconds in timed]
    factor = statistics.median(ratios)
    return statistics.median(abs(factor / ratio - 1) for ratio in ratios), factor


def _prefill(timed: Sequence[tuple[Step, float]]) -> tuple[PrefillPart, float]:
    by_tokens: dict[int, list[float]] = {}
    for step, seconds in timed:
        by_tokens.setdefault(int(step.tokens), []).append(seconds)
    if len(by_tokens) < 2:
        raise ProfileError(f"a step profile needs prefills of two sizes or more, got {sorted(by_tokens)}")
    rows = [[1.0, step.tokens, step.square] for step, _ in timed]
    fit, error = _fitted(rows, [seconds for _, seconds in timed])
    sizes = sorted(by_tokens)
    return PrefillPart(tokens=sizes, latency_s=[statistics.median(by_tokens[t]) for t in sizes], fit=fit), error


def _decode(timed: Sequence[tuple[Step, float]]) -> tuple[DecodePart, float]:
    table = {(step.decodes, round(step.context / step.decodes)): seconds for step, seconds in timed}
    batch, context = sorted({b for b, _ in table}), sorted({c for _, c in table})
    if not table:
        raise ProfileError("a step profile needs decodes of one batch and one context or more, got none")
    if missing := [(b, c) for b in batch for c in context if (b, c) not in table]:
        raise ProfileError(f"decodes were not measured on a full grid; missing (batch, context): {missing}")
    fit, error = _fitted([[1.0, s.decodes, s.context] for s, _ in timed], [seconds for _, seconds in timed])
    rows = [[table[b, c] for c in context] for b in batch]
    return DecodePart(batch=batch, context=context, latency_s=rows, fit=fit), error


def _fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[tuple[float, float, float], float]:
    """Least squares of relative errors, without negative coefficients; the fit and its median relative error."""
    x, y = np.array(rows), np.array(seconds)
    active = np.ones(3, dtype=bool)
    weights = np.zeros(3)
    for _ in range(3):
        weights[:] = 0.0
        weights[active] = np.linalg.lstsq(x[:, active] / y[:, None], np.ones(len(y)), rcond=None)[0]
        if not (weights < 0).any():
            break
        active &= weights >= 0
    error = float(np.median(np.abs(x @ weights / y - 1)))
    a, b, c = weights.tolist()
    return (a, b, c), error


def save_steps(file: StepsFile, path: Path | str) -> None:
    """Write one file, and the folder that it lies in."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(file.model_dump(exclude_none=True), indent=1) + "\n")
