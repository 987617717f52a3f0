"""When the next output of a generation is due for the sake of those behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from neustream.core.job import Job
from neustream.core.policies.model_queues import ModelQueues, at_decode

CATCH = 0.25
"""Share of the outputs ahead within which `steady` brings a generation back to its pace."""


def tightened(model: ModelQueues, least: float) -> dict[Job, float]:
    """Deadlines of next outputs that leave time for the rest, where a total was promised.

    `least`: seconds of a decode alone.
    """
    return {
        job: min(job.due_next, job.due - _outputs_behind(model, job) * least)
        for job in (*model.decodes, *model.prefills)
        if job.due < math.inf
    }


def _outputs_behind(model: ModelQueues, job: Job) -> float:
    """Outputs that usually follow the next one; 0 while no generation was seen to end."""
    lengths = model.view.lengths.get(model.label)
    if lengths is None:
        return 0.0
    seen = lengths.median(job.call_outputs)
    if seen == math.inf:
        return 0.0
    most = job.calls_left.get(f"{model.label}.decode", 0)
    if at_decode(job):
        most -= 1
    return min(float(max(most, 0)), seen)


def steady(
    model: ModelQueues, tight: Mapping[Job, float], least: float, step: float
) -> dict[Job, float]:
    """Tighter deadlines, so that outputs come at their TPOT where they came early.

    `step`: seconds of a decode of all.
    """
    label = f"{model.label}.decode"
    lengths = model.view.lengths.get(model.label)
    tighter = {}
    for job in model.decodes:
        gain = job.slo.step - step
        if not 0 < gain < math.inf:
            gain = 0.0
        ahead = float(job.calls_left.get(label, 0))
        if lengths is not None:
            ahead = min(ahead, lengths.median(job.call_outputs))
        due = job.first_at + job.call_outputs * job.slo.step + gain * ahead * CATCH
        if model.view.now + least <= due < tight.get(job, job.due_next):
            tighter[job] = due
    return tighter
