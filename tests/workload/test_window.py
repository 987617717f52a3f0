"""What a workload takes of a trace: windows, speed, limits, order, and how much of the file is read for it."""

from __future__ import annotations

import tracemalloc

import pytest
from files import put, taken

from neustream import ConfigError
from neustream.workload import Trace, Window, records, take


def times(*arrivals):
    return "\n".join(["arrival_s", *map(str, arrivals), ""])


def arrivals(found):
    return [row.arrival_s for row in found.rows]


def test_the_first_request_comes_at_zero(tmp_path):
    assert arrivals(taken(put(tmp_path, times(5, 6.5, 8)))) == [0.0, 1.5, 3.0]


def test_a_window_counts_from_the_first_arrival_of_the_file(tmp_path):
    path = put(tmp_path, times(*range(5, 20)))
    found = taken(path, start_s=3, duration_s=4)
    assert [row.line for row in found.rows] == [5, 6, 7, 8]
    assert arrivals(found) == [0.0, 1.0, 2.0, 3.0]
    assert [row.line for row in taken(path, start_s=3, requests=2).rows] == [5, 6]


def test_speed_divides_the_gaps(tmp_path):
    assert arrivals(taken(put(tmp_path, times(5, 6, 9)), speed=2.0)) == [0.0, 0.5, 2.0]


def test_rows_out_of_order_are_sorted_and_said(tmp_path):
    path = put(tmp_path, times(3, 1, 2, 9, 4))
    found = taken(path)
    assert [row.line for row in found.rows] == [3, 4, 2, 6, 5]
    assert arrivals(found) == [0.0, 1.0, 2.0, 3.0, 8.0]
    assert found.notes.lines() == ["3 rows out of order, sorted by arrival"]
    assert [row.line for row in taken(path, start_s=1, requests=2).rows] == [4, 2]
    assert [row.line for row in taken(path, start_s=1, duration_s=2.5).rows] == [4, 2, 6]


def test_rows_of_one_instant_stay_in_the_files_order(tmp_path):
    path = put(tmp_path, times(2, 1, 2, 1, 2, 0))
    assert [row.line for row in taken(path).rows] == [7, 3, 5, 2, 4, 6]
    assert [row.line for row in taken(path, requests=4).rows] == [7, 3, 5, 2]


def test_a_window_without_rows_is_told_with_the_span(tmp_path):
    path = put(tmp_path, times(5, 7, 12))
    with pytest.raises(ConfigError, match=r"no rows from start_s 3 to 5; its arrivals span 7 s"):
        taken(path, start_s=3, duration_s=2)


def test_a_trace_is_the_same_each_time(tmp_path):
    path = put(tmp_path, times(3, 1, 2))
    trace = Trace(path)
    assert take(trace, Window(requests=2)) == take(trace, Window(requests=2))


@pytest.fixture
def lines_read(monkeypatch):
    """How many lines were read of files since."""
    count = [0]
    read = records.lines

    def counted(path):
        for entry in read(path):
            count[0] += 1
            yield entry

    monkeypatch.setattr(records, "lines", counted)
    return count


@pytest.mark.parametrize("window", [{"requests": 10}, {"duration_s": 10}, {"start_s": 5, "duration_s": 5}])
def test_reading_ends_with_the_window_where_arrivals_do_not_go_back(tmp_path, lines_read, window):
    path = put(tmp_path, times(*range(1000)))
    taken(path, **window)
    assert 10 <= lines_read[0] < 30
    lines_read[0] = 0
    taken(put(tmp_path, times(1, 0, *range(1, 1000))), **window)
    assert lines_read[0] > 2000


def memory_for(path, rows):
    """The most bytes held while a window is taken of a file of that many rows, all of which must be read."""
    with path.open("w") as file:
        file.write("arrival_s,prompt_tokens,output_tokens\n1,1,1\n0,1,1\n")
        file.writelines(f"{at / 8},{at % 900 + 1},{at % 90 + 1}\n" for at in range(8, rows))
    tracemalloc.start()
    try:
        found = taken(path, start_s=100, requests=200)
        return len(found.rows), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_long_trace_needs_no_more_memory_than_what_is_taken_of_it(tmp_path):
    assert memory_for(tmp_path / "warm", 3_000)[0] == 200
    taken_of_short, short = memory_for(tmp_path / "short", 3_000)
    taken_of_long, long = memory_for(tmp_path / "long", 12_000)
    assert taken_of_short == taken_of_long == 200
    assert long < 1.1 * short
    assert long < (tmp_path / "long").stat().st_size
