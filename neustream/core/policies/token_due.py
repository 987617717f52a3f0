"""When the next output of a generation is due for the sake of those behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from neustream.core.job import Job
from neustream.core.policies.model_queues import ModelQueues, at_decode

CATCH = 0.25
"""Share of the outputs ahead within which `steady` brings a generation back to its pace."""


def tightened(model: ModelQueues, least: float) -> dict[Job, float]:
    """Deadlines of next outputs that leave time for the rest, where a total was promised.

    `least`: seconds of a decode alone.
    """
    jobs = [job for job in (*model.decodes, *model.prefills) if job.leg_latest < math.inf]
    behind = _outputs_behind(model, jobs)
    return {
        job: min(job.due_next, job.leg_latest - outputs * least)
        for job, outputs in zip(jobs, behind, strict=True)
    }


def _outputs_behind(model: ModelQueues, jobs: Sequence[Job]) -> list[float]:
    """Outputs that usually follow the next one of each; 0 while no generation was seen to end."""
    label = f"{model.label}.decode"
    seen = _usual(model, jobs)
    most = [max(job.calls_here(label) - at_decode(job), 0) for job in jobs]
    return [
        0.0 if outputs == math.inf else min(float(left), outputs)
        for outputs, left in zip(seen, most, strict=True)
    ]


def _usual(model: ModelQueues, jobs: Sequence[Job]) -> list[float]:
    """Median outputs to come of each generation; inf where none was seen to end."""
    lengths = model.view.lengths.get(model.label)
    if lengths is None or not jobs:
        return [math.inf] * len(jobs)
    usual: list[float] = lengths.each_within(
        np.array([job.call_outputs for job in jobs]), 0.5
    ).tolist()
    return usual


def steady(
    model: ModelQueues, tight: Mapping[Job, float], least: float, step: float
) -> dict[Job, float]:
    """Tighter deadlines, so that outputs come at their TPOT where they came early.

    `step`: seconds of a decode of all.
    """
    label = f"{model.label}.decode"
    tighter = {}
    for job, usual in zip(model.decodes, _usual(model, model.decodes), strict=True):
        gain = job.slo.step - step
        if not 0 < gain < math.inf:
            gain = 0.0
        ahead = min(float(job.calls_here(label)), usual)
        due = job.first_at + job.call_outputs * job.slo.step + gain * ahead * CATCH
        if model.view.now + least <= due < tight.get(job, job.due_next):
            tighter[job] = due
    return tighter
