"""What decisions take, by what is decided."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from neustream.core.asked import Asked
from neustream.engine.events import Decided


class DecisionTime(NamedTuple):
    """Seconds that a decision takes.

    decision_s: any, that a step stands included; decision_request_s: more for each request that a
    policy is asked about; decision_new_s: more for each of these that has not run.
    """

    decision_s: float = 0.0
    decision_request_s: float = 0.0
    decision_new_s: float = 0.0

    def of(self, asked: Asked) -> float:
        """Of one decision, by what was asked."""
        any_s, request_s, new_s = self
        return any_s + asked.requests * request_s + asked.new * new_s


AT_ONCE = DecisionTime()
"""Decisions that take no time."""


def decision_time(records: Sequence[Decided]) -> DecisionTime:
    """What is closest to what some decisions took, by least squares, no part of it below 0.

    With a part that any takes, so that all together take what they took; nothing of nothing.
    """
    if not records:
        return AT_ONCE
    columns = np.array([(1.0, record.requests, record.new) for record in records])
    seconds = np.array([record.seconds for record in records])
    best, error = AT_ONCE, float(seconds @ seconds)
    for kept in product((True, False), repeat=3):
        parts = np.zeros(3)
        parts[list(kept)] = np.linalg.lstsq(columns[:, list(kept)], seconds)[0]
        left = seconds - columns @ parts
        if parts.min() >= 0 and float(left @ left) < error:
            best, error = DecisionTime(*map(float, parts)), float(left @ left)
    return best
