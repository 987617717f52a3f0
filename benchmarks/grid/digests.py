"""What a result depends on, as a key: results that were kept are used where nothing of it changed."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from grid.plan import Point
from grid.policies import made
from neustream.core.policy import Policy
from neustream.experiment import Prepared

ROOT = Path(__file__).parent.parent.parent
BOUND, HINDSIGHT = EXTRA = ("bound", "hindsight")
LIMITS_S = {BOUND: 20.0, HINDSIGHT: 60.0}
"""Seconds after which the best that was found is taken."""
BOUNDS = {
    "images": "neustream.analysis.bounds.graphs.upper",
    "texts": "neustream.analysis.bounds.tokens.upper",
}
"""The modules of the bounds, by kind."""
REGISTRY = "neustream.core.policies"
"""It imports all policies. The engine takes one of it: FCFS, for where another fails."""


def keys(point: Point, policies: Sequence[str]) -> dict[str, str]:
    """The key of each result at a point: by policy, bound and hindsight where they are valid."""
    prepared = point.prepared()
    inputs = _inputs(point, prepared)
    found = {name: digest(inputs, rule(made(prepared, name)), simulator()) for name in policies}
    if point.bounded:
        found[BOUND] = digest(inputs, LIMITS_S[BOUND], code(BOUNDS[point.kind]))
        if point.hindsight:
            found[HINDSIGHT] = digest(inputs, LIMITS_S[HINDSIGHT], code("neustream.analysis.hindsight"))
    return found


def _inputs(point: Point, prepared: Prepared) -> str:
    """Requests, lengths, latencies, pools, and how the device differs from its profile."""
    files = [file for pipeline in prepared.pipelines for file in pipeline.profile_files()]
    truths = [some for pipeline in prepared.pipelines for some in pipeline.truth_files().values()]
    files += [file for some in truths for file in some]
    return digest(
        [[r.graph.name, r.arrival, repr(r.slo), r.params] for r in prepared.requests],
        prepared.lengths,
        [file.read_text("utf-8") for file in files],
        {name: [repr(pool) for pool in pools] for name, pools in prepared.places.items()},
        [[repr(getattr(e, "stages", getattr(e, "llm", None))), repr(e.simulation)] for e in point.parts.values()],
    )


def rule(policy: Policy) -> str:
    """A policy's parameters and code, and those of the policies that are its parameters."""
    held = [value for _, value in _fields(policy) if hasattr(value, "decide")]
    modules = sorted({type(one).__module__ for one in [policy, *held]})
    return digest(type(policy).__name__, policy, [code(module) for module in modules])


def digest(*parts: Any) -> str:
    text = json.dumps(parts, default=plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def plain(value: Any) -> Any:
    """What JSON can tell of a policy's parameter."""
    if is_dataclass(value):
        return [type(value).__name__, dict(_fields(value))]
    if hasattr(value, "latency"):
        return [value.latency(batch) for batch in range(1, value.max_batch + 1)]
    return repr(value)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(value) if is_dataclass(value) else ():
        yield field.name, getattr(value, field.name)


@cache
def simulator() -> str:
    """A digest of what simulates: the engine and `experiment`, without the policies that this imports."""
    package = ROOT / "neustream/experiment"
    names = [path.relative_to(ROOT).with_suffix("").parts for path in sorted(package.rglob("*.py"))]
    own = [parsed(".".join(name).removesuffix(".__init__"))[0] for name in names if "sweeping" not in name]
    engine = reached("neustream.engine.engine", "neustream.core.steps", aside=REGISTRY)
    return digest(engine, parsed("neustream.core.policies.fcfs")[0], own)


@cache
def code(*modules: str) -> str:
    """A digest of modules of the library and of all in it that they import."""
    return digest(reached(*modules))


def reached(*modules: str, aside: str = "") -> dict[str, str]:
    """The code of modules of the library and of all in it that they import, but for one, by name."""
    found: dict[str, str] = {}
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module not in found and module != aside and source(module) is not None:
            found[module], imported = parsed(module)
            todo += imported
    return found


def source(module: str) -> Path | None:
    """The file of a module of the library."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def parsed(module: str) -> tuple[str, list[str]]:
    """The code of a module without comments and docstrings, and names that may be modules it imports."""
    path = source(module)
    assert path is not None, module
    tree = ast.parse(path.read_text("utf-8"))
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree), [name for name in imported if name.startswith("neustream.")]
