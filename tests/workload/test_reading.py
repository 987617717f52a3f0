"""Trace files as people have them: what is read all the same, and what is told by file, line and value."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from files import AZURE_2023, VLLM_OMNI, packed, put, taken

from neustream import ConfigError
from neustream.workload import Row, Trace, records
from neustream.workload.formats.normal import write_trace


def rows(folder, content, **how):
    return taken(put(folder, content), **how).rows


def wrong(folder, content, **how):
    with pytest.raises(ConfigError) as error:
        rows(folder, content, **how)
    message = str(error.value)
    assert message.startswith(f"trace {folder / 'trace'}")
    assert len(message.splitlines()) == 1
    assert len(message) < 900
    return message.removeprefix(f"trace {folder / 'trace'}")


# -- the normal form ------------------------------------------------------------------------------


def test_the_normal_form_in_csv(tmp_path):
    content = (
        "arrival_s,steps,slo_ms,slo_class,params.prompt,params.guidance_scale\n0,3,1500,gold,a cat,7.5\n0.25,,,,,\n"
    )
    assert rows(tmp_path, content) == [
        Row(0.0, 3, slo_s=1.5, slo_class="gold", params={"prompt": "a cat", "guidance_scale": 7.5}, line=2),
        Row(0.25, line=3),
    ]


def test_the_normal_form_in_json_lines(tmp_path):
    content = (
        '{"arrival_s": 0, "prompt_tokens": 3, "hash_ids": [1, 2], "params": {"class_labels": [7]}}\n\n{"arrival_s": 2}'
    )
    assert rows(tmp_path, content) == [
        Row(0.0, prompt_tokens=3, hash_ids=(1, 2), params={"class_labels": [7]}, line=1),
        Row(2.0, line=3),
    ]


def test_promises_have_seconds_or_milliseconds(tmp_path):
    names = ["slo_s", "slo_total_s", "slo_ms", "slo_total_ms"]
    for name in names:
        (row,) = rows(tmp_path, f"arrival_s,{name},slo_ttft_ms,slo_tpot_s\n0,3,250,0.05\n")
        assert (row.slo_s, row.slo_ttft_s, row.slo_tpot_s) == (3.0 if name.endswith("_s") else 0.003, 0.25, 0.05)
    assert wrong(tmp_path, "arrival_s,slo_s,slo_ms\n0,3,3000\n") == (
        ", line 2: column 'slo_ms' is '3000'; allowed: one column for slo_s, but another was read"
    )


# -- read all the same ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks(tmp_path, end, last, mark):
    table = mark + end.join(["arrival_s,steps", "0,3", "", "1,4"]) + (end if last else "")
    assert [row.steps for row in rows(tmp_path, table)] == [3, 4]
    lines = mark + end.join(['{"arrival_s": 0}', "", '{"arrival_s": 1}']) + (end if last else "")
    assert [row.line for row in rows(tmp_path, lines)] == [1, 3]


def test_quoted_cells_hold_commas_quotes_and_newlines(tmp_path):
    content = 'arrival_s,params.prompt,steps\n0,"a ""cat"",\r\nand\na dog",3\n1,owl,4\n'
    first, second = rows(tmp_path, content)
    assert first.params == {"prompt": 'a "cat",\r\nand\na dog'}
    assert (first.line, second.line) == (2, 5)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_lines(tmp_path, mark):
    raw = json.dumps({"arrival_s": 0, "params": {"prompt": f"a{mark}b"}}, ensure_ascii=False)
    if mark < " ":
        raw = f'arrival_s,params.prompt\n0,"a{mark}b"\n'
    assert rows(tmp_path, raw)[0].params == {"prompt": f"a{mark}b"}


def test_a_cell_may_be_larger_than_the_csv_module_allows_and_its_limit_stays(tmp_path):
    before = csv.field_size_limit()
    content = f'arrival_s,params.prompt\n0,{"x" * 300_000}\n1,"{"y" * 200_000}\n{"z" * 200_000}"\n'
    assert [len(row.params["prompt"]) for row in rows(tmp_path, content)] == [300_000, 400_001]
    assert csv.field_size_limit() == before


def test_numbers_as_programs_write_them(tmp_path):
    content = "arrival_s,steps\n0,50.0\n1e-3, 50 \n2.,5e1\n"
    assert [(row.arrival_s, row.steps) for row in rows(tmp_path, content)] == [(0.0, 50), (0.001, 50), (2.0, 50)]


def test_unix_times_are_taken_from_the_first(tmp_path):
    assert [row.arrival_s for row in rows(tmp_path, "arrival_s\n1732500000.25\n1732500001\n")] == [0.0, 0.75]


def test_a_column_without_a_name_is_not_read_and_neither_is_a_row_without_content(tmp_path):
    assert [row.arrival_s for row in rows(tmp_path, " \n,arrival_s,\n0,5,\n,,\n  \n1,6,\n")] == [0.0, 1.0]


def test_equal_rows_are_as_many_requests(tmp_path):
    content = '{"arrival_s": 0, "session": "a"}\n' * 3
    assert [row.line for row in rows(tmp_path, content)] == [1, 2, 3]


def test_gzip_files_joined_together(tmp_path):
    assert len(rows(tmp_path, packed("arrival_s\n0\n") + packed("1\n2\n"))) == 3


# -- told -----------------------------------------------------------------------------------------

NORMAL = [
    ("arrival_s,stpes\n0,3\n", ", line 1: unknown column 'stpes'; did you mean 'steps'?"),
    ("arrival_s, steps\n0,3\n", ", line 1: unknown column ' steps'; did you mean 'steps'?"),
    ("arrival_s,Steps\n0,3\n", ", line 1: unknown column 'Steps'; did you mean 'steps'?"),
    ("arrival_s,params.steps\n0,3\n", ", line 1: unknown column 'params.steps'; did you mean 'steps'?"),
    ('{"arrival_s": 0, "params": {"steps": 3}}', "allowed: parameters that are no columns; 'steps' is one"),
    ('{"arrival_s": 0, "params": {"a": [1e999]}}', "'1e999' is too large for a number"),
    ("arrival_s,params.a-b\n0,3\n", ", line 1: unknown column 'params.a-b'"),
    ('{"arrival_s": 0}\n{"arrival_s": 1, "stpes": 3}', ", line 2: unknown column 'stpes'; did you mean 'steps'?"),
    ("arrival,steps\n0,3\n", "the nearest is 'neustream', which needs 'arrival_s' (the file has 'arrival')"),
    ("arrival_s;steps\n0;3\n", "(cells are separated by semicolons; allowed: commas)"),
    ("arrival_s,steps,steps\n0,3,4\n", ", line 1: column 'steps' is there 2 times; allowed: once"),
    ('{"arrival_s": 0, "arrival_s": 1}', "key 'arrival_s' is there twice"),
    ("arrival_s,steps\n0,3\n1,2,3\n", ", line 3: 3 cells, more than columns: ['1', '2', '3']; allowed: 2"),
    ("arrival_s,steps\n0,3\n1", ", line 3: 1 cells, fewer than columns: ['1']; allowed: 2"),
    ("arrival_s,steps\n0,3\n,4", ", line 3: column 'arrival_s' is ''; allowed: a value"),
    ('{"steps": 3}', "needs 'arrival_s'"),
    ('{"arrival_s": 3}\n{"steps": 3}', ", line 2: column 'arrival_s' is None; allowed: a value"),
    ("arrival_s,params\n0,[1]\n", ", line 2: column 'params' is '[1]'; allowed: an object of parameters by name"),
    ("arrival_s,hash_ids\n0,1 2\n", ", line 2: column 'hash_ids' is '1 2'; allowed: a list of whole numbers"),
    ('{"arrival_s": 0, "hash_ids": [1, 2.5]}', ", line 1: column 'hash_ids' is [1, 2.5]; allowed: a list of whole"),
    ('{"arrival_s": 0, "session": [1]}', ", line 1: column 'session' is [1]; allowed: a text"),
    ("arrival_s,steps\n0,3\n", ": unknown format 'mooncak'; did you mean 'mooncake'? allowed: auto, azure_llm"),
]


@pytest.mark.parametrize(("content", "message"), NORMAL)
def test_what_is_wrong_is_told(tmp_path, content, message):
    how = {"format": "mooncak"} if "mooncak" in message else {}
    assert message in wrong(tmp_path, content, **how)


@pytest.mark.parametrize(
    "value", ["-1", "nan", "NaN", "inf", "-inf", "soon", "1e12", "1,5", "1_0", "0x10", "٣", "1e999"]
)
def test_an_arrival_that_is_none(tmp_path, value):
    message = wrong(tmp_path, f'arrival_s,steps\n0,1\n"{value}",2\n')
    assert message == f", line 3: column 'arrival_s' is {value!r}; allowed: seconds from 0 to 1e+11"


@pytest.mark.parametrize("value", ["-1", "2.5", "nan", "1e30", "many", "9" * 5000, "1_000", "True"])
def test_a_count_that_is_none(tmp_path, value):
    message = wrong(tmp_path, f"arrival_s,steps\n0,{value}\n")
    assert message.startswith(", line 2: column 'steps' is '")
    assert message.endswith("; allowed: a whole number from 0 to 1000000")


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "true", "[1]", '{"a": 1}', '"x"', "-1", "1e999", "9" * 5000])
def test_a_number_of_json_that_is_none(tmp_path, value):
    assert ", line 2: " in wrong(tmp_path, f'{{"arrival_s": 0}}\n{{"arrival_s": 1, "steps": {value}}}')


@pytest.mark.parametrize("value", ["0", "-1", "nan", "1e13", "soon"])
@pytest.mark.parametrize("column", ["slo_s", "slo_ms", "slo_ttft_ms", "slo_tpot_s"])
def test_a_promise_that_is_none(tmp_path, column, value):
    message = wrong(tmp_path, f"arrival_s,{column}\n0,{value}\n")
    assert message.startswith(f", line 2: column {column!r} is {value!r}; allowed: ")


DATES = [
    "16.11.2023 18:17",
    "2023-11-16",
    "2023-02-29 00:00:00",
    "2023-11-16 24:00:00",
    "2023-11-16 00:60:00",
    "0",
    "2023-11-16 00:00:00+24:00",
]


@pytest.mark.parametrize("value", DATES)
def test_a_date_that_is_none(tmp_path, value):
    message = wrong(tmp_path, f"{AZURE_2023}\r\n{value},1,1")
    assert message.startswith(f", line 5: column 'TIMESTAMP' is {value!r}; allowed: a date and time, as in 2023-")


def test_dates_with_and_without_time_zones_are_not_mixed(tmp_path):
    message = wrong(tmp_path, f"{AZURE_2023}\r\n2023-11-16 18:18:00+00:00,1,1")
    assert message.endswith("is '2023-11-16 18:18:00+00:00'; allowed: without a time zone, as in the first row")


def test_a_misspelt_column_of_a_public_format_is_told_with_the_nearest(tmp_path):
    message = wrong(tmp_path, "TIMESTAMP,ContextTokns,GeneratedTokens\n2023-11-16 18:17:03,1,1")
    assert "the nearest is 'azure_llm', which needs 'ContextTokens' (the file has 'ContextTokns')" in message
    message = wrong(tmp_path, "Timestamp,Model,Request tokens,Response token\n1,x,1,1\n", format="burstgpt")
    assert "format 'burstgpt' needs column 'Response tokens'; did you mean 'Response token'? the file has: " in message
    message = wrong(tmp_path, '{"timestamp": 1, "input_length": 2}', format="mooncake")
    assert message == ", line 1: column 'output_length' is None; allowed: a value"


FILES = [
    (b"", ": has no rows"),
    (b"\xef\xbb\xbf \r\n", ": has no rows"),
    (b"arrival_s,steps\n", " has no rows"),
    (b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,0\n", "has no rows (1 row skipped: no output"),
    (b"arrival_s\n0\n\xe9\n", ", line 3: byte 0xe9 at 0; allowed: UTF-8"),
    ("arrival_s,session\n0,é\n".encode("latin-1"), ", line 2: byte 0xe9 at 2; allowed: UTF-8"),
    ("arrival_s\n0\n".encode("utf-16"), ": encoded as UTF-16 or UTF-32; allowed: UTF-8"),
    ("arrival_s\n0\n".encode("utf-16-le"), ", line 1: a NUL character; allowed: text"),
    (b"\x7fELF\x00\x01", ", line 1: a NUL character"),
    (b"PK\x03\x04abc", ": packed with zip; allowed: gzip, or unpacked"),
    (b"\x28\xb5\x2f\xfdabc", ": packed with zstd; allowed: gzip, or unpacked"),
    (b"\x1f\x8bgarbage", ": the gzip stream is broken"),
    (gzip.compress(packed("arrival_s\n0\n"), mtime=0), ": gzipped twice; allowed: once"),
    (b"arrival_s,steps\r0,3\r", ", line 1: not CSV: new-line character"),
    (b'arrival_s,steps\n0,"3\n1,4\n', ", line 2: not CSV: unexpected end of data"),
    (b'arrival_s,session\n0,"a"b\n', ", line 2: not CSV: ',' expected after '\"'"),
    (b'{"arrival_s": 0}\n{"arrival_s"', ", line 2: not JSON: "),
    (b'{\n"arrival_s": 0}', ", line 1: not JSON: "),
    (b'{"arrival_s": 0}\n3\n', ", line 2: 3; allowed: an object with columns as its keys"),
    (b'{"arrival_s": ' + b"[" * 100_000 + b"}", ", line 1: not JSON: "),
    (b'[{"arrival_s": 1,\n\n"steps": 1}\n{"id": 2}]', ", line 4: '{'; allowed: ']' of an array of objects"),
    (b'[{"arrival_s": 1},\n{"id"', ", line 2: not JSON: "),
    (b"[1]", ", line 1: 1; allowed: an object with columns as its keys"),
    (b"[]", ": has no rows"),
    (b"[] x", ", line 1: 'x' after the end of the array; allowed: nothing"),
    (b"Request(width=1, width=2)", "with literals as values, each name once"),
    (b"Request(timestamp=1)\nRequest(timestamp=", ", line 2: 'Request(timestamp='; allowed: Request(name=value, ...)"),
    (b"Request(" + b"(" * 5000 + b")", ", line 1: "),
    (b"Request(timestamp=1, seed=" + b"9" * 5000 + b")", ", line 1: "),
    (VLLM_OMNI.encode() + b"Request(width=2)", ", line 3: no arrival; allowed: one in each row, or in none"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_file_that_is_no_trace_is_told(tmp_path, content, message):
    assert message in wrong(tmp_path, content)


def test_a_gzip_file_cut_off_is_told_by_its_line(tmp_path):
    whole = packed("arrival_s\n" + "".join(f"{at}\n" for at in range(50_000)))
    message = wrong(tmp_path, whole[:-400])
    assert message.startswith(", line ") and "the gzip stream is broken: Compressed file ended before" in message


def test_thousands_of_columns(tmp_path):
    names = [f"column_{at}" for at in range(5000)]
    content = ",".join(["arrival_s", *names]) + "\n" + ",".join(map(str, range(5001))) + "\n"
    assert "unknown column 'column_0'" in wrong(tmp_path, content)
    other = ",".join(["TIMESTAMP", *names, "ContextTokens", "GeneratedTokens"])
    cells = ",".join(["2023-11-16 18:17:03", *["x"] * 5000, "1", "2"])
    assert len(rows(tmp_path, f"{other}\n{cells}\n")) == 1
    assert "columns of no known format" in wrong(tmp_path, ",".join(names))


def test_a_record_without_an_end_is_told_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 200_000)
    assert ", line 1: longer than 200,000 bytes" in wrong(tmp_path, b"a" * 300_000)
    assert "field larger than field limit" in wrong(tmp_path, 'arrival_s,session\n0,"' + "abc\n" * 100_000)


@pytest.mark.parametrize("name", ["nowhere", "", "nul\0name"])
def test_what_is_no_file_is_told(tmp_path, name):
    with pytest.raises(ConfigError, match=r"trace .*: (No such file|not a file|.*null)"):
        next(Trace(tmp_path / name).rows())


def test_what_can_be_written_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"written as one of .csv, .jsonl, .csv.gz, .jsonl.gz"):
        write_trace(tmp_path / "t.txt", [Row(0.0)])
    with pytest.raises(ConfigError, match="a row has no arrival_s"):
        write_trace(tmp_path / "t.csv", [Row()])
    with pytest.raises(ConfigError, match="a text holds a NUL character"):
        write_trace(tmp_path / "t.csv", [Row(0.0, session="a\0")])
