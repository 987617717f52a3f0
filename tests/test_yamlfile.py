"""YAML of configs: strict, with lines, and with an end whatever is in the file."""

from __future__ import annotations

import os

import pytest

from neustream import ConfigError
from neustream.config.yaml_file import DEEPEST, LARGEST, parse_value, read_document

REPEATED = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = [
    ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' is given twice (first on line 1)"),
    ("a:\n  b: {c: 1, c: 2}\n", "line 2: key 'c' is given twice (first on line 2)"),
    ("yes: 1\ntrue: 2\n", "line 2: key True is given twice (first on line 1)"),
    ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n", "line 4: key '<<' is given twice (first on line 3); merge several"),
    ("a: {<<: 3}\n", "line 1: << merges a mapping or a list of mappings, got a scalar"),
    ("a: {<<: [{b: 1}, 3]}\n", "line 1: << merges a mapping or a list of mappings, got a scalar"),
    ("a: &a\n  b: *a\n", "line 1: an anchor that contains itself"),
    ("a: &a [1, [*a]]\n", "line 1: an anchor that contains itself"),
    ("a: &a {<<: *a}\n", "line 1: an anchor that contains itself"),
    ("a: *b\n", "line 1: found undefined alias 'b'"),
    (REPEATED, "more than 100000 values, anchors repeated"),
    ("a: " + "[" * 2000, f"line 1: deeper than {DEEPEST} levels"),
    ("".join(f"{' ' * at}a:\n" for at in range(500)), f"line {DEEPEST}: deeper than {DEEPEST} levels"),
    ("a: " + "9" * 5000, "line 1: a number of 5000 characters, at most 100 are allowed: '9999"),
    ("a: 0x" + "f" * 5000, "line 1: a number of 5002 characters"),
    ("a: " + "1:" * 2000 + "1.5", "line 1: a number of 4003 characters"),
    ("a: 1\0\n", "line 1: character 0x0000 is not allowed"),
    ('a: 1\nb: "x\\0y"\n', "line 2: character 0x0000 is not allowed in a text"),
    ('a: "\\ud800"\n', "line 1: character 0xd800 is not allowed in a text"),
    ("a: !!int x\n", "line 1: 'x' is no int"),
    ("a: !!bool x\n", "line 1: 'x' is no bool"),
    ("a: !!timestamp x\n", "line 1: 'x' is no timestamp"),
    ("a: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
    ("a: 1\n---\nb: 2\n", "line 2: expected a single document"),
    ("a: [1\n", "line 2: while parsing a flow sequence, expected ',' or ']'"),
    ("a: b: c\n", "line 1: mapping values are not allowed here"),
    ("[1]: 2\n", "line 1: while constructing a mapping, found unhashable key"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_is_told_in_a_line_with_its_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_document(path)
    told = str(error.value)
    assert told.startswith(f"{path}: ") and message in told
    assert "\n" not in told and len(told) < len(str(path)) + 300


def document(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_document(str(path))


def test_merge_keys(tmp_path):
    text = """
base: &base {x: 1, y: {deep: 1}}
over: &over {<<: *base, x: 2}
nested: {<<: *over, z: 3}
list: {<<: [*over, *base], y: 4}
first: {<<: [*base, *over]}
"""
    assert document(tmp_path, text).values == {
        "base": {"x": 1, "y": {"deep": 1}},
        "over": {"x": 2, "y": {"deep": 1}},
        "nested": {"x": 2, "y": {"deep": 1}, "z": 3},
        "list": {"x": 2, "y": 4},
        "first": {"x": 1, "y": {"deep": 1}},
    }


def test_lines_are_those_of_the_keys_and_of_what_is_merged(tmp_path):
    text = "a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  y:\n    - 3\n    - z: 4\n"
    lines = document(tmp_path, text).lines
    assert lines["b",] == 4 and lines["b", "x"] == 2 and lines["b", "y"] == 6
    assert lines["b", "y", "1", "z"] == 8
    assert ("b", "<<") not in lines


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1E5", -100000.0),
        ("2024-05-10", "2024-05-10"),
        ("2001-99-99", "2001-99-99"),
        ("null", None),
        ("", None),
        ("[a, 1]", ["a", 1]),
        ("1_000", 1000),
        ("on", True),
        ("=", "="),
        ("{=: =}", {"=": "="}),
    ],
)
def test_values(text, value):
    assert parse_value("--set x", text) == value


def test_a_byte_order_mark_and_crlf(tmp_path):
    assert document(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: 2\r\n").values == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a: \xff\n", "not UTF-8: byte 0xff at position 3"),
        (b"a" * (LARGEST + 1), f"larger than {LARGEST} bytes"),
        (b"", "expected a mapping at the top, got nothing"),
    ],
)
def test_bytes_that_are_no_config(tmp_path, raw, message):
    with pytest.raises(ConfigError, match=message):
        document(tmp_path, raw)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "/dev/zero: not a regular file"),
        ("/dev/null", "/dev/null: not a regular file"),
        ("/", "/: Is a directory"),
        ("a\0b", "'a\\x00b': embedded null"),
        ("a/" * 3000, "File name too long"),
        ("nowhere.yaml/x", "No such file or directory"),
        (__file__ + "/x", "Not a directory"),
    ],
)
def test_files_that_are_no_configs(path, message):
    with pytest.raises(ConfigError) as error:
        read_document(path)
    assert message in str(error.value)


def test_a_pipe_that_nobody_writes_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_document(tmp_path / "pipe")
