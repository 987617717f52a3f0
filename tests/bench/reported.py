"""Runs of a benchmark, for tests of its reports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neustream.bench import Record, Run
from neustream.bench.reports.building import About, reports
from neustream.bench.reports.checking import read_content, report_of
from neustream.bench.reports.observability import Report
from neustream.workload.asks import Limits

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("NEUSTREAM_LLMD") or ROOT.parent / "shared/reference/llmd")
SCHEMA = FOLDER / "br_v0_2_1_json_schema.json"
theirs = pytest.mark.skipif(not SCHEMA.is_file(), reason="NEUSTREAM_LLMD names no folder with llm-d's schema")
START = 1.7e9
SCENARIO = {"source": "random", "input_seq_len": {"distribution": "fixed", "value": 9}}


def record(at, **more):
    """Due at `at`, sent 10 ms late; four tokens, the first after 0.1 s, then each 20 ms."""
    told = {
        "scheduled_s": float(at),
        "sent_s": at + 0.01,
        "token_times_s": [at + 0.1 + 0.02 * k for k in range(4)],
        "end_s": at + 0.2,
        "input_tokens": 10,
        "output_tokens": 4,
        "counted_by": "usage",
        "sent_bytes": 300,
        "limits": Limits(ttft_s=0.15, e2e_s=1.0),
    }
    return Record(str(at), **{**told, **more})


def a_run(*records, **more):
    found = list(records) or [
        record(0),
        record(1, token_times_s=[1.5, 1.6], output_tokens=2, end_s=1.6),
        record(2, outcome="status", status=429, token_times_s=[], output_tokens=None, error="queue full"),
        record(3, outcome="interrupted", token_times_s=[], output_tokens=None, end_s=4.0),
    ]
    plan = {"rate": 2.0, "concurrency": 8, "seed": 1, "meta": {}}
    told = {"plan": plan, "target": {"model": "m", "url": "http://x:1"}, "started": START, "duration_s": 4.0}
    return Run("rate 2", found, **{**told, **more})


def one(run=None, **about):
    (found,) = reports([run or a_run()], About(**about))
    return found.content()


def read_report(path: Path) -> Report:
    """The report in a file, which is one."""
    return report_of(read_content(path), str(path))
