"""`neustream trace`: what a trace holds, as numbers, bars and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from files import AZURE_2023, BURSTGPT, CONVERSATIONS, VLLM_OMNI, put, tokenizer
from toys import command

from neustream import ConfigError
from neustream.workload import Trace, gamma_arrivals
from neustream.workload.summary import BINS, SHAPE, summarize


def table(folder, arrivals, lengths):
    lines = [f"{at},{length},1" for at, length in zip(arrivals, lengths, strict=True)]
    return put(folder, "\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]))


def test_rate_and_burstiness_are_those_of_the_gaps(tmp_path):
    arrivals = gamma_arrivals(400, rate=5.0, cv=2.0, seed=0)
    order = np.random.RandomState(1).permutation(400)
    summary = summarize(Trace(table(tmp_path, arrivals[order].tolist(), range(1, 401))))
    gaps = np.diff(arrivals)
    assert summary.rows == 400
    assert summary.span_s == pytest.approx(arrivals[-1] - arrivals[0])
    assert summary.rate == pytest.approx(1 / gaps.mean())
    assert summary.cv == pytest.approx(gaps.std() / gaps.mean())
    assert len(summary.per_bin) == BINS and sum(summary.per_bin) == 400
    assert any("out of order, sorted by arrival" in note for note in summary.notes)


def test_lengths_have_percentiles_that_are_lengths(tmp_path):
    numbers = summarize(Trace(table(tmp_path, range(200), [*range(1, 101)] * 2))).numbers
    assert set(numbers) == {"prompt_tokens", "output_tokens"}
    shape = numbers["prompt_tokens"].pop("shape")
    assert numbers["prompt_tokens"] == {
        "rows": 200, "mean": 50.5, "p0": 1, "p50": 50, "p90": 90, "p99": 99, "p100": 100
    }  # fmt: skip
    assert len(shape) == SHAPE and sum(shape) == 198
    assert numbers["output_tokens"]["p99"] == 1


def test_one_row_and_rows_of_one_instant_have_no_rate(tmp_path):
    for arrivals in ([5], [5, 5, 5]):
        summary = summarize(Trace(table(tmp_path, arrivals, arrivals)))
        assert (summary.span_s, summary.rate, summary.cv) == (0, None, None)
        assert summary.per_bin == [len(arrivals)]
        assert command("trace", tmp_path / "trace").status == 0


def test_a_trace_without_rows_is_told(tmp_path):
    with pytest.raises(ConfigError, match="has no rows"):
        summarize(Trace(put(tmp_path, "arrival_s\n")))


def test_the_command_prints_numbers_bars_and_what_was_left_out(tmp_path):
    done = command("trace", put(tmp_path, BURSTGPT))
    assert (done.status, done.err) == (0, "")
    assert "trace: burstgpt, 2 rows" in done.out
    assert "41 s, 0.0244 requests/s" in done.out
    assert "1 row skipped: no output tokens: a failed call" in done.out
    assert "columns not used: 'Elapsed time', 'Log Type', 'Model', 'Total tokens'" in done.out
    assert "█" in done.out
    widths = [len(line) for line in done.out.splitlines()[1:]]
    assert max(widths) <= 80


def test_the_command_says_dates_and_sizes(tmp_path):
    assert "from 2023-11-16 18:17:03.9799600" in command("trace", put(tmp_path, AZURE_2023)).out
    done = command("trace", put(tmp_path, VLLM_OMNI))
    for name in ("steps", "width", "height", "frames", "slo_s"):
        assert name in done.out


def test_the_command_writes_json_and_the_normal_form(tmp_path):
    path = put(tmp_path, VLLM_OMNI)
    done = command("trace", path, "--json", "-")
    assert json.loads(done.out) == json.loads(json.dumps(summarize(Trace(path)).to_dict()))
    done = command("trace", path, "--out", tmp_path / "normal.jsonl.gz")
    assert done.status == 0
    again = summarize(Trace(tmp_path / "normal.jsonl.gz"))
    assert (again.format, again.rows) == ("neustream", 2)
    assert again.numbers == summarize(Trace(path)).numbers


def test_a_trace_of_texts(tmp_path):
    pytest.importorskip("tokenizers")
    done = command("trace", put(tmp_path, json.dumps(CONVERSATIONS)), "--tokenizer", tokenizer(tmp_path))
    assert done.status == 0
    assert "no arrivals: a workload draws them" in done.out
    assert "session: 2 different" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "ConfigError: trace nowhere.csv: No such file or directory"),
        (["trace", "--format", "azure"], "ConfigError: --format 'azure': did you mean 'azure_l"),
        (["trace", "--out", "normal.txt"], "ConfigError: trace normal.txt: written as one of .csv, .jsonl"),
        (["bad"], "ConfigError: trace bad, line 2: column 'arrival_s' is 'x'; allowed: seconds from 0"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path, monkeypatch, arguments, message):
    put(tmp_path, AZURE_2023)
    put(tmp_path, "arrival_s\nx\n", "bad")
    monkeypatch.chdir(tmp_path)
    done = command("trace", *arguments)
    assert done.status == 2
    assert done.err.startswith(message)
    assert done.err.count("\n") == 1
    assert done.out == ""
