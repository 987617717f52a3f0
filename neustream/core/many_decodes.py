"""Seconds of many decodes at once, to the bit as one by one: arrays where the profile allows it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from neustream.core.learnt_steps import LearntSteps
from neustream.core.profile import LatencyProfile, LinearProfile
from neustream.core.steps import DecodeGrid, Step, StepLatency, StepProfile

Floats = NDArray[np.float64]


def decode_seconds(steps: StepLatency, batch: Floats, context: Floats) -> Floats:
    """Seconds of decodes of `batch` requests that read `context` tokens [...].

    Batches are whole numbers of 1 or more. A rule may ask about more than run in one step, as if
    all who wait had come: a fit goes on beyond its largest batch, a table stays as it is there.
    """
    if isinstance(steps, StepProfile):
        return _profiled(steps.decode, batch, context)
    if isinstance(steps, LearntSteps):
        base = None if steps.base is None else decode_seconds(steps.base, batch, context)
        return steps.decodes(base, batch, context)
    each = zip(batch.ravel().tolist(), context.ravel().tolist(), strict=True)
    seconds = [steps.seconds(Step(decodes=int(size), context=total)) for size, total in each]
    return np.array(seconds).reshape(batch.shape)


def _profiled(profile: LatencyProfile, batch: Floats, context: Floats) -> Floats:
    if isinstance(profile, LinearProfile):
        base, per_job, per_size, _ = profile.coefficients
        seconds: Floats = base + per_job * batch + per_size * context
        if seconds.min() > 0:
            return seconds
    if isinstance(profile, DecodeGrid):
        return _interpolated(profile, batch, context)
    largest = np.minimum(batch, profile.max_batch)
    each = zip(largest.ravel().tolist(), context.ravel().tolist(), strict=True)
    return np.array([profile.latency(int(b), c) for b, c in each]).reshape(batch.shape)


def _interpolated(grid: DecodeGrid, batch: Floats, total: Floats) -> Floats:
    """As `DecodeGrid.latency`."""
    rows, columns, table = grid.arrays
    context = total / batch
    nearest_batch = np.minimum(np.maximum(batch, rows[0]), rows[-1])
    nearest_context = np.minimum(np.maximum(context, columns[0]), columns[-1])
    i, above, x = _cells(rows, nearest_batch)
    j, k, y = _cells(columns, nearest_context)
    each, across = table.ravel(), table.shape[1]
    i *= across
    above *= across
    rest = 1 - y
    low = rest * each.take(i + j) + y * each.take(i + k)
    high = rest * each.take(above + j) + y * each.take(above + k)
    inside: Floats = (1 - x) * low + x * high
    within = (nearest_batch == batch) & (nearest_context == context)
    if within.all():
        return inside
    _, per_job, per_token = grid.fit
    beyond = per_job * (batch - nearest_batch)
    beyond += per_token * (total - nearest_batch * nearest_context)
    seconds: Floats = np.where(within, inside, np.maximum(inside + beyond, table[0, 0] / 2))
    return seconds


def _cells(axis: Floats, values: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """The points of an axis at or below each value and above it, and how far it is between them.

    The last value of the axis is all the way from the last but one.
    """
    index = axis[1:-1].searchsorted(values, side="right")
    if len(axis) == 1:
        return index, index.copy(), np.zeros(values.shape)
    above = index + 1
    below = axis.take(index)
    return index, above, (values - below) / (axis.take(above) - below)
