"""Events of a stream, as the standard has them, however its bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neustream.bench.events import Event, Events

LINES = st.sampled_from(
    [b"data: a", b"data:b", b"data", b": note", b"event: error", b"id: 7", b"odd", b"", b"", b"data:  c"]
)
ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])


def by_the_standard(text: bytes) -> list[Event]:
    """Line by line, of the whole text."""
    lines = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    found, data, kind = [], [], ""
    for line in lines:
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if not line:
            if data:
                found.append(Event(kind, b"\n".join(data)))
            data, kind = [], ""
        elif name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value.decode()
    return found


@settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.lists(st.tuples(LINES, ENDS), max_size=12), st.lists(st.integers(0, 120), max_size=8))
def test_wherever_a_stream_is_cut_its_events_are_the_same(bom, lines, cuts):
    text = b"\xef\xbb\xbf" * bom + b"".join(line + end for line, end in lines)
    whole = by_the_standard(text)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    events = Events()
    found = [event for a, b in pairwise(places) for event in events.feed(text[a:b])]
    assert found == whole
    events = Events()
    assert [event for byte in text for event in events.feed(bytes([byte]))] == whole


WHOLE = st.sampled_from(
    [b"data: a\n\n", b"data: a\n\n", b"data: b\r\n\r\n", b"data: c\r\r", b"\n", b"event: error\n", b"data: d\n"]
) | st.sampled_from([b"data: e\n\ndata: f\n\n", b"data: \n\n", b"da", b"data: g\rh\n\n"])


@settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=300)
@given(st.lists(WHOLE, max_size=8))
def test_events_that_come_whole_are_those_of_the_standard(pieces):
    """Most servers send each event by itself."""
    events = Events()
    assert [event for piece in pieces for event in events.feed(piece)] == by_the_standard(b"".join(pieces))


def test_an_event_that_is_not_ended_is_none():
    events = Events()
    assert events.feed(b"data: a\n") == [] and events.feed(b"") == []
    assert events.feed(b"\n") == [Event("", b"a")]


@pytest.mark.parametrize("size", [1, 1000])
def test_what_a_long_line_takes_is_linear_in_its_bytes(size):
    """Pieces are put together once, when the line ends."""
    events = Events()
    for _ in range(20_000):
        assert events.feed(b"x" * size) == []
    assert len(events._pieces) == 20_000
    assert events.feed(b"\ndata: a\n\n") == [Event("", b"a")]
