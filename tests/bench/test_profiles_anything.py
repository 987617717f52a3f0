"""Whatever stands in a profile: it is read, or told in a line what is wrong with it."""

from __future__ import annotations

import copy
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from profile_files import ALL, FLAT, bare  # noqa: F401

from neustream.bench.profiles import Given, Unrunnable, read_profile
from neustream.bench.profiles.telling import lines, told
from neustream.errors import ConfigError
from neustream.workload.texts import Texts

pytestmark = pytest.mark.usefixtures("bare")
ODD = [None, True, 0, -1, 0.5, 1e308, 2**63, "", "x", "none", "nan", float("inf"), float("nan"), [], [1], {}, {"a": 1}]
ODD += [
    "REPLACE_ENV_X",
    "http://[",
    "a" * 5000,
    {"kind": "x"},
    {"type": "x"},
    "1,2",
    "[1, 2]",
    "{",
    ["x", None],
    "\x85",
]
FAST = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(value, before=()):
    """Keys to every value in there, the outer ones first."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*before, key)
        yield from places(inner, (*before, key))


@some.composite
def profiles(draw):
    """A profile of ours with up to three values that are odd, gone, or there without a reason."""
    found = copy.deepcopy(draw(some.sampled_from([*ALL.values(), FLAT])))
    for _ in range(draw(some.integers(1, 3))):
        *outer, last = draw(some.sampled_from(list(places(found)) or [("x",)]))
        at = found
        for key in outer:
            at = at[key]
        what = draw(some.sampled_from(["odd", "gone", "more"]))
        if what == "odd" or not isinstance(at, dict):
            at[last] = draw(some.sampled_from(ODD))
        elif what == "gone":
            at.pop(last, None)
        else:
            at[draw(some.sampled_from(["more", "type", "kind", "rate", "std"]))] = draw(some.sampled_from(ODD))
    return found


def check(path, lenient=False):
    try:
        profile = read_profile(path, Given(lenient=lenient))
    except (Unrunnable, ConfigError) as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    assert list(lines(profile, Texts())) and json.dumps(told(profile, Texts()), allow_nan=False)


@FAST
@given(profiles(), some.booleans())
def test_a_profile_with_odd_values_is_read_or_told(tmp_path, profile, lenient):
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump(profile))
    check(path, lenient)


@FAST
@given(some.text(max_size=80))
def test_any_text_is_no_profile_in_a_line(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    check(path)
