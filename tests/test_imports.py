"""Imports run one way, `import neustream` stays light, and no file grows long."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import Counter

import pytest

import neustream
import neustream.cli
from neustream.cli import COMMANDS

HEAVY = {"torch", "diffusers", "transformers", "vllm", "scipy", "matplotlib", "PIL", "ray"}
MOST_LINES = 400
LIGHT = {"numpy", "pydantic", "yaml", "rich"}
"""What `neustream` needs, but not to show its help."""
MAY = {
    "core": {"core", "errors", "numpy"},
    "engine": {"core", "engine", "errors", "numpy"},
    "cluster": {"cluster", "core", "engine", "errors", "numpy"},
    "service": {"by_name", "core", "engine", "service", "errors"},
    "server": {
        "config",
        "core",
        "engine",
        "service",
        "server",
        "errors",
        "pydantic",
        "starlette",
        "python_multipart",
        "uvicorn",
        "prometheus_client",
        "opentelemetry",
        "PIL",
    },
    "bench": {
        "bench",
        "config",
        "core",
        "workload",
        "engine",
        "errors",
        "numpy",
        "pydantic",
        "yaml",
        "httptools",
        "jsonschema",
        "tokenizers",
        "matplotlib",
    },
}
"""All that the rooms at the bottom may import."""
USERS = {
    "server": {"server", "backends", "commands"},
    "backends": {"backends", "serving", "commands"},
    "commands": {"commands", "cli"},
    "cli": {"__main__"},
}
"""Who may import the rooms at the top."""
BOUND = "its linear programs; only who asks for a bound loads it"
HEAVY_OUTSIDE_BACKENDS = {
    "analysis/bounds/linear.py": ({"scipy"}, BOUND),
    "analysis/plots.py": ({"matplotlib"}, "it draws; only who asks for a figure loads it"),
    "bench/figures.py": ({"matplotlib"}, "it draws; only who asks for a figure loads it"),
    "server/pictures.py": ({"PIL"}, "pictures of clients are looked at before any model is; only then it is loaded"),
}
HEAVY_IN_FUNCTIONS = {
    "backends/serving.py": "pictures are written when a run is over, and only by models that make some",
    "backends/loading/texts.py": "of the models in a server's config, only the libraries that they need are loaded",
    "backends/loading/images.py": "likewise",
    "backends/vllm/contract.py": "it looks piece by piece at the vLLM that is installed, and says what is missing",
    "backends/ray/cluster.py": "it says what is wrong with the Ray that is installed, or that there is none",
    "backends/ray/wire.py": "in a process without Ray nothing goes to others but what pickle can do",
    "backends/vllm/served.py": "it is described where vLLM is not installed",
    "server/pictures.py": "a server of texts has none",
    "backends/vllm/executor.py": "graphs around vLLM are described where it is not installed",
}


def imports(tree: ast.AST, *, functions: bool = True) -> set[str]:
    """The modules that code imports, inside `try` and `if` too; not what only type checkers see."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found |= imports(ast.Module(node.orelse, []), functions=functions)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not functions:
            continue
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            found |= imports(node, functions=functions)
    return found


@pytest.fixture(scope="module")
def files(root) -> dict[str, ast.Module]:
    """The package's code by file name: "core/job.py"."""
    package = root / "neustream"
    return {str(path.relative_to(package)): ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}


def room_of(name: str) -> str:
    """The first part of a file's or module's name below the package, or the foreign package."""
    parts = name.removesuffix(".py").replace("/", ".").removeprefix("neustream.").split(".")
    return parts[0]


def heavy(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} & HEAVY


def test_imports_are_seen_wherever_they_stand():
    code = """
import a
try:
    import b.c
except ImportError:
    from d import e
if TYPE_CHECKING:
    import unseen
else:
    import f
class C:
    from g import h
def function():
    with x:
        import i
"""
    module_level = {"a", "b.c", "d", "d.e", "f", "g", "g.h"}
    assert imports(ast.parse(code)) == module_level | {"i"}
    assert imports(ast.parse(code), functions=False) == module_level


@pytest.mark.parametrize("room", MAY)
def test_the_rooms_at_the_bottom_import_only_what_is_below_them(files, room):
    wrong = [
        f"{file}: {name}"
        for file, tree in files.items()
        if room_of(file) == room
        for name in imports(tree)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and (room_of(name) not in MAY[room] or name == "neustream")
    ]
    assert wrong == []


@pytest.mark.parametrize("room", USERS)
def test_the_rooms_at_the_top_are_imported_only_from_above(files, room):
    wrong = [
        file
        for file, tree in files.items()
        if room_of(file) not in USERS[room]
        and any(name.startswith("neustream.") and room_of(name) == room for name in imports(tree))
    ]
    assert wrong == []


def test_only_the_clock_reads_the_time(files):
    assert [file for file, tree in files.items() if "time" in imports(tree)] == ["engine/clock.py"]


def test_heavy_imports_live_in_backends_and_in_files_with_a_reason(files):
    outside = {file: heavy(imports(tree)) for file, tree in files.items() if room_of(file) != "backends"}
    assert {file: names for file, names in outside.items() if names} == {
        file: names for file, (names, _) in HEAVY_OUTSIDE_BACKENDS.items()
    }


def test_heavy_imports_are_inside_functions_only_in_files_with_a_reason(files):
    inside = {file for file, tree in files.items() if heavy(imports(tree)) - heavy(imports(tree, functions=False))}
    assert inside == set(HEAVY_IN_FUNCTIONS)


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
        assert len(about) <= 60, "longer lines are cut in the list of commands"
        module = importlib.import_module(f"neustream.commands.{name}")
        if not hasattr(module, "COMMANDS"):
            assert module.command.__doc__
            continue
        assert module.__doc__
        for inner, of_inner in module.COMMANDS.items():
            assert len(of_inner) <= 60
            assert importlib.import_module(f"neustream.commands.{name}_{inner.replace('-', '_')}").command.__doc__


def test_public_names_exist():
    assert sorted(neustream.__all__) == sorted(set(neustream.__all__))
    for name in neustream.__all__:
        assert hasattr(neustream, name), name


def test_files_of_tests_have_names_of_their_own(root):
    """They are modules without a package: pytest ends where two have one name."""
    names = Counter(path.name for path in (root / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("folder", ["neustream", "tests", "benchmarks", ".ci"])
def test_no_file_is_longer_than_one_can_read_in_one_go(root, folder):
    lengths = {path: len(path.read_text().splitlines()) for path in (root / folder).rglob("*.py")}
    assert lengths and [f"{path}: {length} lines" for path, length in lengths.items() if length > MOST_LINES] == []
