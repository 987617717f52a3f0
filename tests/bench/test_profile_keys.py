"""Every key of the tools' profiles is run, listed as ignored, or refused by name: `profile_keys.yaml` has them all."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from profile_files import ALL, FLAT, bare, changed, read  # noqa: F401
from pydantic import BaseModel

from neustream.bench.profiles import Unrunnable
from neustream.bench.profiles.flat import Flat
from neustream.bench.profiles.guidellm import Benchmark, Scenario
from neustream.bench.profiles.inference_perf import InferencePerf
from neustream.bench.profiles.marks import Ignored, Refused
from neustream.bench.profiles.nop import Nop
from neustream.bench.profiles.vllm_bench import VllmBench

pytestmark = pytest.mark.usefixtures("bare")
TABLE = yaml.safe_load(Path(__file__).with_name("profile_keys.yaml").read_text())
PROFILES = {**ALL, "flat": FLAT}
SECTIONS = {
    "vllm-benchmark": [VllmBench],
    "nop": [Nop],
    "inference-perf": [InferencePerf],
    "guidellm": [Scenario, Benchmark],
    "flat": [Flat],
}
UNPLAYED = {"Multimodal"}
"""Sections that are known by their keys and refused as a whole."""
OTHERS = {"metadata", "metadata.labels", "spec"}
"""Keys of guidellm that hold others, or any."""


def cases(*verdicts):
    return [
        pytest.param(dialect, group, key, value, id=f"{dialect} {key} {value}"[:70])
        for dialect, groups in TABLE.items()
        for group in groups
        for verdict in verdicts
        for key, value in group.get(verdict, {}).items()
    ]


def put(profile, values, folder):
    """The profile with values at dotted paths; null takes a key out."""
    for key, value in values.items():
        named = {"FILE": folder / "file.txt", "OTHER": folder / "other.txt"}
        given = str(named[value]) if isinstance(value, str) and value in named else value
        profile = changed(profile, **{key.replace(".", "__"): ... if given is None else given})
    return profile


@pytest.fixture
def folder(tmp_path):
    for name in ("file", "other"):
        (tmp_path / f"{name}.txt").write_text("one two three four five six\n" * 3)
    return tmp_path


def based(dialect, group, folder):
    return put(PROFILES[dialect], group.get("base", {}), folder)


def played(profile):
    """All that a run depends on."""
    not_played = ("left", "notes", "values", "path", "dialect")
    return {name: value for name, value in vars(profile).items() if name not in not_played}


@pytest.mark.parametrize(("dialect", "group", "key", "value"), cases("run"))
def test_a_key_that_is_run_changes_what_is_played(folder, dialect, group, key, value):
    base = based(dialect, group, folder)
    found = read(folder, put(base, {key: value}, folder))
    assert played(found) != played(read(folder, base)), "it changes nothing"
    assert key not in {each.key for each in found.left}


@pytest.mark.parametrize(("dialect", "group", "key", "value"), cases("ignored"))
def test_a_key_that_is_ignored_is_listed_with_a_reason(folder, dialect, group, key, value):
    base = based(dialect, group, folder)
    found = read(folder, put(base, {key: value}, folder))
    (why,) = [each.why for each in found.left if each.key == group.get("by", key)]
    assert why and played(found) == played(read(folder, base))


@pytest.mark.parametrize(("dialect", "group", "key", "value"), cases("only"))
def test_the_only_value_of_a_key_changes_nothing(folder, dialect, group, key, value):
    base = based(dialect, group, folder)
    found = read(folder, put(base, {key: value}, folder))
    assert (played(found), found.left) == (played(read(folder, base)), read(folder, base).left)


@pytest.mark.parametrize(("dialect", "group", "key", "value"), cases("refused", "known"))
def test_a_key_that_is_not_run_is_refused_by_name(folder, dialect, group, key, value):
    named = group.get("by", key)
    with pytest.raises(Unrunnable) as error:
        read(folder, put(based(dialect, group, folder), {key: value}, folder))
    text = str(error.value).partition(": ")[2]
    assert text.startswith(named) and len(text.partition(": ")[2]) > 10


# -- no key is left out ------------------------------------------------------------------------------


def sections(annotation):
    """The sections in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for each in get_args(annotation):
        yield from sections(each)


def keys(section, path=""):
    """Keys by their paths without numbers, each with the class that has it; none below one that is marked."""
    for name, field in section.model_fields.items():
        key = f"{path}.{name}" if path else name
        owner = next(each for each in section.__mro__ if name in each.__dict__.get("__annotations__", {}))
        yield key, (owner.__name__, name)
        marks = [each for each in field.metadata if isinstance(each, Ignored | Refused)]
        for inner in () if marks else sections(field.annotation):
            if inner.__name__ not in UNPLAYED:
                yield from keys(inner, key)


@pytest.mark.parametrize("dialect", TABLE)
def test_all_keys_are_in_the_table(dialect):
    there = [pair for section in SECTIONS[dialect] for pair in keys(section)]
    tried = set()
    for group in TABLE[dialect]:
        for verdict in {"run", "ignored", "only", "refused", "known"} & group.keys():
            for key in group[verdict]:
                plain = [part for part in key.replace("-", "_").split(".") if not part.isdecimal()]
                tried |= {".".join(plain[:end]) for end in range(1, len(plain) + 1)}
    known = {key for key, _ in there}
    assert tried <= known, "keys that no section has"
    covered = {owned for key, owned in there if key in tried or key in OTHERS}
    assert not {key: owned for key, owned in there if owned not in covered}
