"""What a server's own `/metrics` say while a load is on it, for the reports.

Read are the names that vLLM and neustream share: requests that run and that wait, the use of the KV
cache, preemptions.
"""

from __future__ import annotations

import http.client
import math
import re
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neustream.bench.plan import Target
from neustream.bench.reports.figures import instant, only_mean, statistics
from neustream.bench.reports.observability import ComponentObservability, Resources, ResourceSeries
from neustream.bench.reports.schema import Point, Series
from neustream.bench.reports.units import Units
from neustream.engine.clock import epoch

NAMES: Mapping[str, Units] = {
    "num_requests_running": "count",
    "num_requests_waiting": "count",
    "kv_cache_usage_perc": "fraction",
    "num_preemptions_total": "count",
}
"""Names behind `neustream:` or `vllm:`."""
LINE = re.compile(r"(?:neustream|vllm):(\w+)(?:\{(.*)\})? ([-+.\deE]+)(?: \d+)?")
MODEL = re.compile(r'\bmodel(?:_name)?="((?:[^"\\]|\\.)*)"')
ANSWER_S = 5.0
LARGEST = 8 * 2**20

Sample = dict[str, float]
"""Names and values, and `at`: when, in seconds since 1970."""


def parsed(text: str, model: str) -> Sample:
    """The values of one model in a text of metrics; summed over engines, of shares the mean."""
    found: dict[str, list[float]] = {}
    for match in filter(None, map(LINE.fullmatch, text.splitlines())):
        name, labels, value = match.groups()
        of = MODEL.search(labels or "")
        if name in NAMES and (of is None or of[1] == model):
            found.setdefault(name, []).append(float(value))
    found = {name: values for name, values in found.items() if all(map(math.isfinite, values))}
    return {
        name: sum(values) / (len(values) if NAMES[name] == "fraction" else 1)
        for name, values in found.items()
    }


class Scraper:
    """Reads a server's metrics every `every_s` seconds while it is entered. A context manager."""

    def __init__(self, target: Target, every_s: float) -> None:
        self.samples: list[Sample] = []
        self._target = target
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            if sample := self._look():
                self.samples.append(sample | {"at": epoch()})
            if self._stop.wait(self._every_s):
                return

    def _look(self) -> Sample:
        """Nothing where there are no metrics, or nobody answers: that is no fault of the load."""
        request = urllib.request.Request(
            self._target.url + "/metrics", headers=dict(self._target.headers)
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                text = answer.read(LARGEST).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError):
            return {}
        return parsed(text, self._target.model)


def component(samples: Sequence[Mapping[str, float]], label: str) -> ComponentObservability | None:
    """What was read of a server, of the component with this label; None if that is nothing."""
    values = {name: [each[name] for each in samples if name in each] for name in NAMES}
    if not any(values.values()):
        return None
    lost = values["num_preemptions_total"]
    aggregate = Resources(
        running_requests=statistics(values["num_requests_running"], "count"),
        waiting_requests=statistics(values["num_requests_waiting"], "count"),
        kv_cache_usage=statistics(values["kv_cache_usage_perc"], "fraction"),
        preemptions=only_mean(lost[-1] - lost[0], "count") if lost else None,
    )
    return ComponentObservability(
        component_label=label,
        aggregate=aggregate,
        time_series=ResourceSeries.model_validate(dict(_series(samples))),
    )


def _series(samples: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, Any]]:
    names = {"kv_cache_usage_perc": "kv_cache_usage", "num_preemptions_total": "num_preemptions"}
    for name, units in NAMES.items():
        points = [
            Point(ts=instant(each["at"]), value=each[name]) for each in samples if name in each
        ]
        if points:
            yield names.get(name, name), Series(units=units, series=points)
