"""Versions of Ray that are refused, and names that are not there; without Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from neustream import BackendError
from neustream.backends.ray import Cluster, contract


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


def test_make_is_a_function():
    with pytest.raises(BackendError, match="make is a function of a device, got 3"):
        Cluster(3)
    with pytest.raises(BackendError, match=r"instances=\(1, 2\): a scaler is to choose"):
        Cluster(len, instances=(1, 2))
