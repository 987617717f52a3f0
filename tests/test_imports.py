"""Imports run one way, and `import neustream` stays light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import neustream
import neustream.cli
from neustream.cli import COMMANDS

HEAVY = {"torch", "diffusers", "transformers", "vllm", "scipy", "matplotlib", "PIL", "ray"}
LIGHT = {"numpy", "pydantic", "yaml", "rich"}
"""What `neustream` needs, but not to show its help."""
CORE_MAY = {"neustream.core", "neustream.errors", "numpy"}
ENGINE_MAY = CORE_MAY | {"neustream.engine"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports when it is loaded (not inside functions or TYPE_CHECKING)."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def outside(folder: Path, allowed: set[str]) -> list[str]:
    """Imports of the files in `folder` that are neither allowed nor of the standard library."""
    wrong = []
    for path in sorted(folder.rglob("*.py")):
        for name in imports(path):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names:
                continue
            if not any(name == ok or name.startswith(f"{ok}.") for ok in allowed):
                wrong.append(f"{path.name}: {name}")
    return wrong


def test_core_imports_only_itself_and_numpy(root):
    assert outside(root / "neustream/core", CORE_MAY) == []


def test_workloads_import_only_core_and_themselves(root):
    assert outside(root / "neustream/workload", CORE_MAY | {"neustream.workload"}) == []


def test_engine_imports_only_core_and_itself(root):
    assert outside(root / "neustream/engine", ENGINE_MAY) == []


def test_only_the_clock_reads_the_time(root):
    readers = [p.name for p in (root / "neustream").rglob("*.py") if "time" in imports(p)]
    assert readers == ["clock.py"]


def test_heavy_imports_live_in_backends_alone(root):
    package = root / "neustream"
    for path in package.rglob("*.py"):
        heavy = {name.partition(".")[0] for name in imports(path)} & HEAVY
        assert not heavy or path.is_relative_to(package / "backends"), f"{path} imports {heavy}"


def loaded_by(code: str, names: set[str]) -> list[str]:
    """Which of `names` have been imported when `code` has run in a new process."""
    report = f"import atexit, sys; atexit.register(lambda: print(sorted(set(sys.modules) & {names}), file=sys.stderr))"
    done = subprocess.run([sys.executable, "-c", f"{report}\n{code}"], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stderr.splitlines()[-1])


def test_all_names_of_the_package_are_there_without_any_framework():
    assert loaded_by("from neustream import *; import neustream.cli", HEAVY) == []


def test_importing_the_package_loads_nothing_but_itself():
    assert loaded_by("import neustream", {*HEAVY, *LIGHT, "typer"}) == []


def test_the_help_loads_none_of_what_commands_do():
    code = "import sys; sys.argv = ['neustream', '--help']; import neustream.cli; neustream.cli.main()"
    assert loaded_by(code, {*HEAVY, *LIGHT}) == []


def test_names_are_where_type_checkers_look_for_them(root):
    tree = ast.parse((root / "neustream/__init__.py").read_text())
    (seen,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {(node.module, alias.name) for node in seen.body for alias in node.names}
    assert imported == {(module, name) for module, names in neustream._HOMES.items() for name in names}
    assert {name for _, name in imported} == set(neustream.__all__) <= set(dir(neustream))


def test_what_the_package_lacks_is_an_attribute_error():
    assert neustream.errors.NeustreamError is neustream.NeustreamError
    with pytest.raises(AttributeError, match=r"module 'neustream' has no attribute 'serv'"):
        _ = neustream.serv


def test_every_command_is_listed_with_its_help():
    for name, about in COMMANDS.items():
        assert importlib.import_module(f"neustream.commands.{name}").command.__doc__
        assert len(about) <= 60, "longer lines are cut in the list of commands"
    files = {path.stem for path in Path(neustream.cli.__file__).parent.glob("commands/*.py")}
    assert set(COMMANDS) <= files


def test_public_names_exist():
    assert sorted(neustream.__all__) == sorted(set(neustream.__all__))
    for name in neustream.__all__:
        assert hasattr(neustream, name), name
