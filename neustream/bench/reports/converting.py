"""Results from one format to another, as far as the one has what the other needs.

Formats: `runs` (our folder), `vllm` (the JSON of `vllm bench serve`), `lifecycle` (the files of
inference-perf) and `report` (llm-d's Benchmark Report 0.2.1). What has a record for each request
becomes any of them. What was already made of requests (a report, a summary, a JSON without details)
becomes what has none; for the rest it is said what lacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from neustream.bench.reports import foreign
from neustream.bench.reports.aggregated import (
    report_of_summary,
    report_of_vllm,
    summary_of_report,
    vllm_of_report,
)
from neustream.bench.reports.building import About, reports
from neustream.bench.reports.checking import read_yaml, report_of
from neustream.bench.reports.folder import report_file, yaml_text
from neustream.bench.reports.lifecycle import (
    PER_REQUEST,
    per_request,
    stage_file,
    stage_summary,
)
from neustream.bench.reports.observability import Report
from neustream.bench.runs import INDEX, Run, read_runs, write_runs
from neustream.bench.summary import summary
from neustream.errors import ConfigError, nearest

Format = Literal["runs", "vllm", "lifecycle", "report"]
FORMATS: tuple[Format, ...] = get_args(Format)
RECORDS = "a record of each request"


@dataclass(frozen=True)
class Found:
    """Results that were read: runs with records, or a report of what was made of them."""

    runs: Sequence[Run] = ()
    report: Report | None = None


def read_results(path: Path) -> Found:
    """Results in a file or folder, whatever of the formats they are in.

    Raises:
        ConfigError: they are in none; the file is named, and what is wrong with it.
    """
    if path.is_dir() or path.name == INDEX:
        runs, _ = read_runs(path if path.is_dir() else path.parent)
        return Found(runs)
    content = read_yaml(path)
    where = str(path)
    if foreign.is_per_request(content):
        return Found(foreign.runs_of_requests(content, where))
    if foreign.is_vllm(content):
        run = foreign.run_of_vllm(content, where)
        return Found([run]) if run is not None else Found(report=report_of_vllm(content, where))
    if foreign.is_summary(content):
        return Found(report=report_of_summary(content, where))
    if isinstance(content, dict) and {"run", "results"} <= content.keys():
        return Found(report=report_of(content, where))
    raise ConfigError(
        f"{path}: in no format that is known; allowed: a folder with {INDEX}, JSON of vllm bench "
        "serve, inference-perf's per_request or stage lifecycle metrics, a Benchmark Report 0.2.1"
    )


def format_of(word: str) -> Format:
    """The format that a word names."""
    for each in FORMATS:
        if word == each:
            return each
    raise ConfigError(f"--to {word!r}: {nearest(word, FORMATS)}")


def converted(found: Found, to: Format, about: About) -> Mapping[str, str]:
    """Files of a format by their names.

    Raises:
        ConfigError: what was found lacks something; it is named.
    """
    return TO[to](found, about)


def _to_report(found: Found, about: About) -> Mapping[str, str]:
    if found.report is not None:
        return {report_file(0): yaml_text(found.report)}
    return {
        report_file(stage): yaml_text(each) for stage, each in enumerate(reports(found.runs, about))
    }


def _to_lifecycle(found: Found, about: About) -> Mapping[str, str]:
    if found.report is not None:
        return {stage_file(0): _json(summary_of_report(found.report))}
    files = {PER_REQUEST: _json(per_request(found.runs, about.since))}
    for stage, run in enumerate(found.runs):
        files[stage_file(stage)] = _json(stage_summary(run, about.since))
    return files


def _to_runs(found: Found, about: About) -> Mapping[str, str]:
    if found.report is not None:
        raise ConfigError(f"runs need {RECORDS}, which is not in there")
    files: dict[str, str] = {}

    def keep(path: Path, text: str) -> None:
        files[path.name] = text

    write_runs(Path("."), found.runs, keep)
    return files


def _to_vllm(found: Found, about: About) -> Mapping[str, str]:
    if found.report is not None:
        return {"vllm-bench.json": _json(vllm_of_report(found.report))}
    return {
        f"vllm-bench-{stage}.json" if len(found.runs) > 1 else "vllm-bench.json": _json(
            summary(run, about.since, detailed=True)
        )
        for stage, run in enumerate(found.runs)
    }


TO: Mapping[Format, Callable[[Found, About], Mapping[str, str]]] = {
    "runs": _to_runs,
    "vllm": _to_vllm,
    "lifecycle": _to_lifecycle,
    "report": _to_report,
}


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
