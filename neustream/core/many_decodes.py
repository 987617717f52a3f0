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

    Batches are whole numbers of 1 or more.
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
    if isinstance(profile, LinearProfile) and batch.max() <= profile.max_batch:
        base, per_job, per_size, _ = profile.coefficients
        seconds: Floats = base + per_job * batch + per_size * context
        if seconds.min() > 0:
            return seconds
    if isinstance(profile, DecodeGrid):
        return _interpolated(profile, batch, context)
    each = zip(batch.ravel().tolist(), context.ravel().tolist(), strict=True)
    return np.array([profile.latency(int(b), c) for b, c in each]).reshape(batch.shape)


def _interpolated(grid: DecodeGrid, batch: Floats, total: Floats) -> Floats:
    """As `DecodeGrid.latency`."""
    rows, columns, table = grid.arrays
    context = total / batch
    nearest_batch = np.clip(batch, rows[0], rows[-1])
    nearest_context = np.clip(context, columns[0], columns[-1])
    i, x = _cells(rows, nearest_batch)
    j, y = _cells(columns, nearest_context)
    above, k = np.minimum(i + 1, len(rows) - 1), np.minimum(j + 1, len(columns) - 1)
    low = (1 - y) * table[i, j] + y * table[i, k]
    high = (1 - y) * table[above, j] + y * table[above, k]
    inside = (1 - x) * low + x * high
    _, per_job, per_token = grid.fit
    beyond = per_job * (batch - nearest_batch)
    beyond += per_token * (total - nearest_batch * nearest_context)
    within = (nearest_batch == batch) & (nearest_context == context)
    seconds: Floats = np.where(within, inside, np.maximum(inside + beyond, table[0, 0] / 2))
    return seconds


def _cells(axis: Floats, values: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The point of an axis at or below each value, and how far it is to the next one."""
    index = np.maximum(np.searchsorted(axis, values, side="right") - 1, 0)
    last = index == len(axis) - 1
    below = axis[index]
    width = np.where(last, 1.0, axis[np.minimum(index + 1, len(axis) - 1)] - below)
    return index, np.where(last, 0.0, (values - below) / width)
