"""The search for the highest rate, on a queue whose capacity is known."""

from __future__ import annotations

import heapq
import json
from types import SimpleNamespace

import numpy as np
import pytest
from toys import command

from neustream.bench import Record, Run
from neustream.bench.search import Goal, Search
from neustream.workload.arrivals import constant_arrivals, gamma_arrivals
from neustream.workload.asks import Limits

pytestmark = pytest.mark.usefixtures("unhurried")


def queue(capacity, *, places=4, limit_s=None, constant=True):
    """A server of `places`, each of which takes places / capacity seconds; on time: twice of that."""
    service = places / capacity
    limits = Limits(e2e_s=limit_s or 2 * service)

    def play(rate, seed, seconds):
        count = max(100, round(rate * seconds))
        draw = constant_arrivals(count, rate=rate) if constant else gamma_arrivals(count, rate=rate, cv=1.0, seed=seed)
        free = [0.0] * places
        records = []
        for at in map(float, draw):
            start = max(at, heapq.heappop(free))
            heapq.heappush(free, start + service)
            records.append(Record(str(len(records)), scheduled_s=at, sent_s=at, end_s=start + service, limits=limits))
        return Run("", records, duration_s=max(record.end_s for record in records))

    return play


@pytest.mark.parametrize("capacity", [0.3, 3.0, 17.0, 100.0, 431.0])
def test_a_known_capacity_is_found_within_3_percent_in_10_points(capacity):
    found = Search(Goal(start=1.0, point_s=60.0 if capacity > 1 else 2000.0, most_s=4000.0), queue(capacity)).run()
    assert found.bracketed == "yes" and len(found.points) + len(found.confirmed) <= 10
    assert found.rate == pytest.approx(capacity, rel=0.03)
    assert len(found.confirmed) == 2 and found.share.value >= 0.9


def test_with_poisson_arrivals_what_is_found_is_confirmed():
    play = queue(50.0, constant=False)
    found = Search(Goal(start=5.0, point_s=60.0, most_s=240.0), play, seed=3).run()
    assert found.bracketed == "yes" and 25 < found.rate < 50 and found.fails > found.rate
    again = play(found.rate * 0.95, 99, 600.0)
    assert np.mean([record.met() for record in again.records]) > 0.88


def test_not_bracketed_is_said():
    above = Search(Goal(start=1.0, most=8.0, point_s=60.0), queue(100.0)).run()
    assert (above.bracketed, above.rate, above.fails, above.precise) == ("above", 8.0, None, False)
    below = Search(Goal(start=8.0, least=4.0, point_s=60.0), queue(1.0)).run()
    assert (below.bracketed, below.rate) == ("below", None) and below.confirmed == []
    assert min(point.rate for point in below.points) == 4.0
    json.dumps([above.to_dict(), below.to_dict()], allow_nan=False)


def test_a_point_goes_on_while_its_interval_has_the_goal_in_it():
    seconds = []

    def play(rate, seed, length):
        seconds.append((seed, length))
        records = [Record(str(k), end_s=0.1, limits=Limits(e2e_s=1.0 if k % 10 else 0.01)) for k in range(200)]
        return Run("", records, duration_s=1.0)

    found = Search(Goal(points=1, confirm=0, point_s=10.0, most_s=35.0), play).run()
    assert seconds == [(1, 10.0), (2, 10.0), (3, 10.0)]
    (point,) = found.points
    assert not point.sure and point.share.of == 600 and found.rate == 1.0


@pytest.mark.parametrize("steady", [True, False])
def test_a_rate_that_other_seeds_do_not_confirm_is_said(steady):
    inner, tried = queue(10.0), []

    def play(rate, seed, seconds):
        tired = rate in tried and not steady
        tried.append(rate)
        return inner(10 * rate if tired else rate, seed, seconds)

    found = Search(Goal(start=1.0, point_s=60.0, most_s=60.0), play).run()
    assert len(found.confirmed) == 2 and found.holds == steady == found.to_dict()["holds"]
    assert (found.share.value >= 0.9) == steady


def test_what_is_known_is_kept_when_a_point_is_broken_off():
    inner = queue(10.0)

    def play(rate, seed, seconds):
        if rate > 10:
            raise RuntimeError
        return inner(rate, seed, seconds)

    search = Search(Goal(point_s=60.0), play)
    with pytest.raises(RuntimeError):
        search.run()
    assert search.found.rate == 4.0 and len(search.found.points) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "what is on time must be said"),
        (["--goodput", "ttft:1", "--start-rate", "5", "--max-rate", "4"], "--start-rate 5"),
        (["--goodput", "ttft:1", "--arrivals", "x"], "--arrivals 'x'"),
        (["--goodput", "ttft:1", "--burstiness", "0"], "--burstiness 0"),
        (["--goodput", "ttft:1", "--confirm", "10"], "--confirm 10"),
    ],
)
def test_what_is_wrong_is_named(more, says):
    done = command("bench", "search", "--model", "m", *more)
    assert done.status == 2 and says in done.err


def test_a_disk_without_room_for_the_first_point_is_told_before_it(tmp_path, monkeypatch):
    pytest.importorskip("httptools", reason="needs the extra 'bench'")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=10**9, free=10**6))
    asked = ["--goodput", "ttft:1", "--start-rate", "100", "--out", tmp_path, "--random-output-len", "2"]
    done = command("bench", "search", "--base-url", "http://127.0.0.1:9", "--model", "m", *asked)
    assert done.status == 2 and "at least 1.4 MB are needed, 1.0 MB are free on its disk" in done.err


def test_the_command_searches_and_writes(tmp_path):
    pytest.importorskip("httptools", reason="needs the extra 'bench'")
    from stub import Stub

    goal = ["--goodput", "ttft:1000", "--start-rate", "200", "--min-rate", "100", "--point-s", "0.1"]
    goal += ["--max-point-s", "0.1", "--min-requests", "10"]
    data = ["--random-input-len", "2", "--random-output-len", "2"]
    files = ["--json", tmp_path / "s.json", "--out", tmp_path / "out"]
    with Stub(first_s=0.001, gap_s=0.001) as stub:
        done = command("bench", "search", "--base-url", stub.url, "--model", "s503", *goal, *data, *files)
    assert done.status == 5 and "not bracketed: below 100/s" in done.out, done.err
    told = json.loads((tmp_path / "s.json").read_text())
    assert [point["rate"] for point in told["points"]] == [200.0, 100.0] and told["rate"] is None
    assert {"runs.json", "stage_1.records.jsonl", "scales.png", "rates.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
