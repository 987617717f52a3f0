"""The report of a benchmark that puts no load on a server: how long it took to be ready."""

from __future__ import annotations

import uuid
from urllib.parse import urlsplit

from neustream.bench.plan import Target
from neustream.bench.profiles.server import Readiness
from neustream.bench.reports.building import About, engine
from neustream.bench.reports.figures import instant, statistics
from neustream.bench.reports.observability import (
    Observability,
    PodStartup,
    PodStartupTimes,
    Report,
    Results,
)
from neustream.bench.reports.scenario import Scenario
from neustream.bench.reports.schema import RunSection, RunTime


def report_of_nop(target: Target, ready: Readiness, about: About) -> Report:
    """Readiness as the start-up times of one pod, which is the server."""
    then = instant(ready.asked + ready.seconds)
    model = target.model or (ready.models[0] if ready.models else None)
    pod = PodStartup(
        name=urlsplit(target.url).netloc,
        model=model,
        ready_timestamp=then,
        startup_seconds=ready.seconds,
    )
    times = PodStartupTimes(
        collected_at=then, pods=[pod], aggregate=statistics([ready.seconds], "s")
    )
    return Report(
        run=RunSection(
            uid=str(uuid.uuid4()),
            description=about.description or None,
            time=RunTime(start=instant(ready.asked), end=then, duration=f"PT{ready.seconds:.6f}S"),
        ),
        scenario=Scenario(stack=list(about.stack) or [engine({"model": model, "url": target.url})]),
        results=Results(observability=Observability(pod_startup_times=times)),
    )
