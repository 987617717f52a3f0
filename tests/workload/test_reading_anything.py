"""Whatever the bytes of a trace are, it is read or told in one line; what was written is read back."""

from __future__ import annotations

import gzip
import random
import tempfile
from pathlib import Path

import pytest
from files import AZURE_2023, BURSTGPT, DIFFUSIONDB, MOONCAKE, VLLM_OMNI
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream import NeustreamError
from neustream.workload import FORMATS, Row, Trace, take, write_trace

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda name: name not in Row._fields)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)


def maybe(strategy):
    return st.none() | strategy


COUNTS = maybe(st.integers(1, 100_000))
PROMISES = maybe(st.floats(1e-6, 1e6))
ROWS = st.lists(
    st.builds(
        Row,
        arrival_s=st.floats(0, 1e9),
        steps=COUNTS,
        width=COUNTS,
        height=COUNTS,
        frames=COUNTS,
        images=COUNTS,
        prompt_tokens=COUNTS,
        output_tokens=COUNTS,
        max_tokens=COUNTS,
        slo_s=PROMISES,
        slo_ttft_s=PROMISES,
        slo_tpot_s=PROMISES,
        slo_class=maybe(WORDS),
        session=maybe(WORDS),
        model=maybe(WORDS),
        hash_ids=maybe(st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=5).map(tuple)),
        params=st.dictionaries(NAMES, JSON, max_size=3),
        line=st.just(0),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from([".csv", ".jsonl", ".csv.gz", ".jsonl.gz"]))
def test_what_was_written_is_read_back(rows, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"trace{suffix}"
        write_trace(path, rows)
        assert [row._replace(line=0) for row in Trace(path).rows()] == rows
        assert Trace(path).known_format().name == "neustream"


def read(content):
    """Read a file of these bytes by what it says, and by a name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        path.write_bytes(content)
        for name in ("auto", *FORMATS):
            try:
                assert take(Trace(path, name)).rows
            except NeustreamError as error:
                message = str(error)
                assert str(path) in message
                assert len(message.splitlines()) == 1, message


STARTS = st.sampled_from(
    [b"", b"[", b"{", b"Request(", b"PAR1", b"\x1f\x8b", b"arrival_s,steps\n", b'[{"conversations":']
)


@settings(deadline=None, max_examples=60)
@given(STARTS, st.binary(max_size=200))
def test_any_bytes_are_read_or_told_in_one_line(start, rest):
    read(start + rest)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([AZURE_2023, BURSTGPT, DIFFUSIONDB, MOONCAKE, VLLM_OMNI]).map(str.encode),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_trace_with_damage_is_read_or_told_in_one_line(content, damage, packed):
    content = gzip.compress(content, mtime=0) if packed else content
    for at, instead in damage:
        content = content[:at] + instead + content[at + len(instead) + 1 :]
    read(content)


def test_a_parquet_file_with_damage_is_read_or_told_in_one_line(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "trace"
    columns = {"arrival_s": [float(at) for at in range(50)], "session": ["a", "b"] * 25}
    parquet.write_table(arrow.table(columns), path)
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[draw.randrange(4, len(content) - 4)] = draw.randrange(256)
        read(bytes(damaged))
    packed = gzip.compress(content)
    for length in range(20, len(packed), 50):
        read(packed[:length])
    parquet.write_table(arrow.table([[1.0], [2.0]], names=["arrival_s", "arrival_s"]), path)
    with pytest.raises(NeustreamError, match="column 'arrival_s' is there 2 times; allowed: once"):
        take(Trace(path))
