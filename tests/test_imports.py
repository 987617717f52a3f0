"""Imports run one way, and `import neustream` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

HEAVY = {"torch", "diffusers", "transformers", "vllm", "scipy", "matplotlib", "PIL", "ray"}
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


def test_importing_the_package_and_the_command_is_light():
    code = "import sys, neustream, neustream.cli; print(sorted(set(sys.modules) & set(sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code, *sorted(HEAVY)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    import neustream

    assert sorted(neustream.__all__) == sorted(set(neustream.__all__))
    for name in neustream.__all__:
        assert hasattr(neustream, name), name
