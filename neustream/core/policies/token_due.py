"""When the next output of a generation is due for the sake of those behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from neustream.core.job import Job
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.policy import CHANCE
from neustream.core.steps import Step

CATCH = 0.25
"""Share of the outputs ahead within which `steady` brings a generation back to its pace."""


def shortest(model: ModelQueues) -> dict[Job, float]:
    """Seconds of the outputs behind the next one of each prompt whose end was promised by an
    instant, alone, if it ends as early as the shortest generations seen. 0 where few were seen."""
    jobs = [job for job in model.prefills if job.leg_latest < math.inf]
    lengths = model.view.lengths.get(model.label)
    if not jobs or lengths is None:
        return dict.fromkeys(jobs, 0.0)
    alone = model.seconds(Step(decodes=1, context=1.0))
    label = f"{model.label}.decode"
    made = np.array([job.call_outputs for job in jobs])
    least = lengths.each_least(made, CHANCE).tolist()
    return {
        job: alone * min(float(job.calls_here(label)), outputs)
        for job, outputs in zip(jobs, least, strict=True)
    }


def _within(model: ModelQueues, jobs: Sequence[Job], share: float) -> list[float]:
    """Outputs to come within which `share` of such generations end; inf: none was seen to end."""
    lengths = model.view.lengths.get(model.label)
    if lengths is None or not jobs:
        return [math.inf] * len(jobs)
    within: list[float] = lengths.each_within(
        np.array([job.call_outputs for job in jobs]), share
    ).tolist()
    return within


def steady(model: ModelQueues, least: float, step: float) -> dict[Job, float]:
    """Tighter deadlines, so that outputs come at their TPOT where they came early.

    `least`: seconds of a decode alone; `step`: of a decode of all.
    """
    label = f"{model.label}.decode"
    tighter = {}
    for job, usual in zip(model.decodes, _within(model, model.decodes, 0.5), strict=True):
        gain = job.slo.step - step
        if not 0 < gain < math.inf:
            gain = 0.0
        ahead = min(float(job.calls_here(label)), usual)
        due = job.first_at + job.call_outputs * job.slo.step + gain * ahead * CATCH
        if model.view.now + least <= due < job.due_next:
            tighter[job] = due
    return tighter
