"""What calls cost one kind of device, by its profiles. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from neustream.core.demand import Calls
from neustream.core.policies.curve import Curve
from neustream.core.profile import LatencyProfile


class Rates:
    """What the stages of one kind of device take: curves, kept as they are asked for."""

    def __init__(self, profiles: Mapping[str, LatencyProfile]) -> None:
        self.profiles = dict(profiles)
        self._curves: dict[tuple[str, int, float], Curve] = {}
        self._plain: dict[tuple[str, int], float] = {}  # of stages without sizes

    def curve(self, stage: str, limit: int, size: float = 0.0) -> Curve:
        """The curve of a stage; sizes are rounded, so that near ones share it."""
        profile = self.profiles[stage]
        size = float(f"{size:.1g}")
        key = stage, min(limit, profile.max_batch), size
        curve = self._curves.get(key)
        if curve is None:
            if len(self._curves) >= 1024:
                self._curves.clear()
            curve = self._curves[key] = Curve(profile, key[1], size)
        return curve

    def alone(self, calls: Mapping[str, Calls]) -> float:
        """Seconds of some calls, each alone."""
        seconds = 0.0
        for name, each in calls.items():
            seconds += each.count * self.profiles[name].latency(1, each.size, each.size * each.size)
        return seconds

    def charge(self, calls: Mapping[str, Calls]) -> float:
        """Device seconds of some calls in the most efficient batches."""
        return sum(
            [
                each.count * self.efficient(name, each.max_batch, each.size)
                for name, each in calls.items()
            ]
        )

    def efficient(self, stage: str, limit: int, size: float) -> float:
        """Device seconds of one call of a stage in the most efficient batch of up to `limit`."""
        if size:
            return _efficient(self.curve(stage, limit, size))
        seconds = self._plain.get((stage, limit))
        if seconds is None:
            seconds = self._plain[stage, limit] = _efficient(self.curve(stage, limit))
        return seconds


def _efficient(curve: Curve) -> float:
    batch = curve.best[curve.limit]
    return curve.seconds[batch] / batch
