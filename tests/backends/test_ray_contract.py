"""Versions of Ray that are refused, and names that are not there; without Ray."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import typing
from types import SimpleNamespace

import pytest

from neustream import BackendError
from neustream.backends.ray import Cluster, Kind, contract, formats, wire
from neustream.backends.ray.kinds import check_room, options_of
from neustream.cluster import messages
from neustream.core.batch import StepInfo
from neustream.core.carry import Carry
from neustream.core.cursor import Saved
from neustream.core.frames import Told


@pytest.mark.parametrize("version", ["2.49.2", "3.0.0", "1.13"])
def test_a_ray_out_of_range_is_refused_by_its_version(version):
    with pytest.raises(BackendError, match=rf"Ray {version} is installed; .* from 2.50 on, below 3.0"):
        contract.check(SimpleNamespace(__version__=version))


def test_names_that_are_not_there_are_told_all_at_once(monkeypatch):
    names = [("math", "sqrt", ()), ("math", "root", ()), ("shutil", "copytree", ("symlinks", "deep"))]
    monkeypatch.setattr(contract, "NAMES", names)
    why = r"Ray 2.60.0 lacks what neustream uses: math.root \(is not there\); shutil.copytree \(takes no deep\)$"
    with pytest.raises(BackendError, match=why):
        contract.check(SimpleNamespace(__version__="2.60.0"))


@pytest.mark.parametrize("instances", [0, -1, 1.5, True, (2, 1), (1, 2, 3), "two"])
def test_numbers_of_instances_that_are_none(instances):
    with pytest.raises(BackendError, match="instances must be a number from 1 on, or the least and the most"):
        Cluster(len, instances=instances)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"make": {"a": len}}, r"kinds of instances by name, each a .*Kind; 'a' is <built-in function len>"),
        ({"make": {}}, "there is no instance"),
        ({"make": {"a": Kind(len, 0)}}, "there is no instance"),
        ({"make": {"a": Kind(len)}, "instances": 2}, "instances, resources: each kind of instances says itself"),
        ({"make": {"a": Kind(len, 1, 3)}}, "a scaler is to choose between them"),
    ],
)
def test_kinds_that_are_none(options, said):
    with pytest.raises(BackendError, match=said):
        Cluster(**options)


def test_room_is_counted_for_each_kind_and_for_all_together():
    there = {"CPU": 4.0, "GPU": 3.0, "accelerator_type:H100": 1.0}
    new, old = {"num_gpus": 1.0, "accelerator_type:H100": 0.001}, {"num_gpus": 1.0}
    check_room({"new": 1, "old": 2}, {"new": new, "old": old}, there)
    assert options_of(new) == {"num_gpus": 1.0, "resources": {"accelerator_type:H100": 0.001}}
    with pytest.raises(BackendError, match=r"2 instance\(s\) of num_gpus=1, accelerator_type:A100=0.001 .* for: 0"):
        check_room({"new": 2}, {"new": {"num_gpus": 1.0, "accelerator_type:A100": 0.001}}, there)
    with pytest.raises(BackendError, match=r"instances \(2 new, 2 old\) need num_gpus=4 in all; the machines have 3"):
        check_room({"new": 2, "old": 2}, {"new": new, "old": old}, there)


def test_make_is_a_function():
    with pytest.raises(BackendError, match="make is a function of a device, got 3"):
        Cluster(3)
    with pytest.raises(BackendError, match=r"instances=\(1, 2\): a scaler is to choose"):
        Cluster(len, instances=(1, 2))


def test_messages_that_have_other_fields_have_another_format():
    """As sides with other versions would read them wrongly, without an error."""

    def module(*fields):
        made = dataclasses.make_dataclass("Letter", fields, frozen=True)
        made.__module__ = "letters"
        other = type("Other", (), {"__module__": "letters"})
        return SimpleNamespace(__name__="letters", Letter=made, Other=other, Alien=dataclasses.make_dataclass("A", "b"))

    kinds = [["id", "term"], ["term", "id"], ["id"], ["id", "terms"]]
    found = [formats.format_of([module(*fields)]) for fields in kinds]
    assert len(set(found)) == 4
    assert formats.format_of([module("id", "term")]) == found[0]


def with_parts(kind, found):
    """A class that has fields, and those of its fields, as far as their modules name them at runtime."""
    if isinstance(kind, type) and kind not in found and kind.__module__.startswith("neustream."):
        if formats.fields_of(kind) is None:
            return
        found.add(kind)
        with contextlib.suppress(NameError):  # of graphs, which refer to live jobs
            for hint in typing.get_type_hints(kind).values():
                with_parts(hint, found)
    for part in typing.get_args(kind):
        with_parts(part, found)


def test_all_that_is_sent_is_in_the_format():
    found = set()
    for module in (wire, messages):
        for value in vars(module).values():
            with_parts(value, found)
    assert {Carry, Saved, Told, StepInfo} < found
    modules = {module.__name__ for module in formats.MODULES}
    assert {one.__module__ for one in found} - modules == set()


def test_a_named_tuple_counts_too():
    """As where a request stands in its graph."""

    def module(*fields):
        made = collections.namedtuple("Place", fields)
        made.__module__ = "places"
        return SimpleNamespace(__name__="places", Place=made)

    assert formats.format_of([module("at")]) != formats.format_of([module("at", "around")])
