"""The files that a benchmark leaves beside its runs."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from neustream.bench.reports.building import About, reports, version
from neustream.bench.reports.figures import instant
from neustream.bench.reports.lifecycle import (
    PER_REQUEST,
    SUMMARY,
    per_request,
    stage_file,
    stage_summary,
    summary,
)
from neustream.bench.reports.observability import Report
from neustream.bench.runs import Run

METADATA = "run_metadata.yaml"
Write = Callable[[Path, str], None]
"""Puts a text into a file."""


def report_file(stage: int) -> str:
    """The name of a stage's report (from 0); consumers look for exactly this."""
    return f"benchmark_report_v0.2,_stage_{stage}_lifecycle_metrics.json.yaml"


def write_reports(
    folder: Path, runs: Sequence[Run], about: About, write: Write, **metadata: Any
) -> list[Path]:
    """Write reports, lifecycle files and `run_metadata.yaml`; the paths, reports first.

    metadata: of the run, beside its times, as harness_name, harness_workload, harness_rc.
    """
    texts = {report_file(stage): yaml_text(each) for stage, each in enumerate(reports(runs, about))}
    texts[PER_REQUEST] = _json(per_request(runs, about.since))
    texts[SUMMARY] = _json(summary(runs, about.since))
    for stage, run in enumerate(runs):
        texts[stage_file(stage)] = _json(stage_summary(run, about.since))
    texts[METADATA] = _yaml(_metadata(runs, metadata))
    for name, text in texts.items():
        write(folder / name, text)
    return [folder / name for name in texts]


def yaml_text(report: Report) -> str:
    """A report as YAML."""
    return _yaml(report.content())


def json_text(report: Report) -> str:
    """A report as JSON, in which a bound of infinity cannot be said."""
    return json.dumps(_finite(report.content()), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _finite(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner is not None}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _yaml(content: Any) -> str:
    """By libyaml, which takes a tenth of the time that Python does."""
    text: str = yaml.dump(content, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True)
    return text


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _metadata(runs: Sequence[Run], given: dict[str, Any]) -> dict[str, Any]:
    start = min((run.started for run in runs), default=0.0)
    stop = max((run.started + run.duration_s for run in runs), default=0.0)
    target = runs[0].target if runs else {}
    return {
        "harness_start": _shown(instant(start)),
        "harness_stop": _shown(instant(stop)),
        "harness_delta": f"PT{stop - start:.3f}S",
        "harness_version": version(),
        "model": target.get("model", ""),
        "endpoint_url": target.get("url", ""),
        **given,
    }


def _shown(when: datetime.datetime) -> str:
    return when.isoformat()
