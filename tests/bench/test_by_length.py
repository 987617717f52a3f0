"""Latency by what was asked for; and effective-batching's route."""

from __future__ import annotations

import csv
import json

import pytest
from test_compare import write
from toys import command

from neustream.bench import Plan, Record, Run, Target, write_runs
from neustream.bench.by_length import by_length
from neustream.errors import ConfigError
from neustream.workload.asks import Ask


def text(tokens, seconds, outcome="done"):
    return Record("a", asked_tokens=tokens, end_s=seconds, outcome=outcome)


def image(steps, seconds):
    return Record("a", "image", image={"steps": steps, "number": 1}, end_s=seconds)


def test_means_and_totals_are_effective_batchings():
    found = by_length([Run("", [text(10, 1.0), text(10, 3.0), text(40, 8.0), text(5, 1.0, "cut")], duration_s=6.0)])
    assert [(each.length, each.mean_s, each.number) for each in found.lengths] == [(10, 2.0, 2), (40, 8.0, 1)]
    assert found.throughput == 10.0 and found.own_throughput == 5.0 and found.failed == 1
    assert found.per_unit_s == pytest.approx((0.1 + 0.3 + 0.2) / 3)
    assert found.csv() == "num_tokens,mean_latency\n10,2.0\n40,8.0\n"


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([], "expected texts, or images"),
        ([text(1, 1.0), image(1, 1.0)], "there are both"),
        ([text(1, 1.0, "cut")], "no request is done"),
    ],
)
def test_what_has_no_lengths_is_named(records, says):
    with pytest.raises(ConfigError, match=says):
        by_length([Run("", records)])


def test_the_command_draws_a_line_for_each_mode(tmp_path):
    for name, slower in (("none", 3.0), ("dynamic", 1.0)):
        write_runs(tmp_path / name, [Run("", [image(k, k * slower) for k in (5, 9)], duration_s=20.0)], write)
    done = command(
        "bench", "latency-by-length", tmp_path / "none", tmp_path / "dynamic", "--out", tmp_path / "out", "--json", "-"
    )
    assert done.status == 0, done.err
    assert json.loads(done.out)["none"]["lengths"][1] == {"length": 9, "mean_s": 27.0, "number": 1}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"none.csv", "dynamic.csv", "latency_by_length.png"}
    rows = list(csv.DictReader((tmp_path / "out/none.csv").read_text().splitlines()))
    assert rows == [{"num_steps": "5", "mean_latency": "15.0"}, {"num_steps": "9", "mean_latency": "27.0"}]


def test_texts_and_images_are_not_drawn_together(tmp_path):
    write_runs(tmp_path / "a", [Run("", [image(5, 1.0)])], write)
    write_runs(tmp_path / "b", [Run("", [text(5, 1.0)])], write)
    done = command("bench", "latency-by-length", tmp_path / "a", tmp_path / "b")
    assert done.status == 2 and "texts in all folders" in done.err


def test_a_server_is_asked_by_effective_batchings_route(root, monkeypatch):
    pytest.importorskip("httptools", reason="needs the extra 'bench'")
    pytest.importorskip("torch", reason="needs the extra 'llm'")
    pytest.importorskip("starlette", reason="needs the extra 'serve'")
    monkeypatch.syspath_prepend(root / "tests/server")
    from serving import serving, stock, text_service

    from neustream.bench.load import Load

    with serving(lambda metrics: text_service(stock(), metrics)) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        (record,) = Load(Plan([Ask("a", 0.0, "hello", output_tokens=5)]), Target(url, "inference")).run().records
        assert (record.outcome, record.output_tokens, record.counted_by) == ("done", 5, "asked")
        (record,) = Load(Plan([Ask("a", 0.0, "hi", output_tokens=4)]), Target(url, ignore_eos=True)).run().records
        assert (record.outcome, record.output_tokens, len(record.token_times_s)) == ("done", 4, 4)
