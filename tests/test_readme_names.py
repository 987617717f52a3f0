"""Files, links, commands, keys and options that the READMEs name exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import typer
from pages import EVERY_PAGE, OF_REPOSITORY, ROOT, blocks, commands, text_of

from neustream.cli import COMMANDS, application
from neustream.config import load_config
from neustream.experiment import prepare, simulate


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end with."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@EVERY_PAGE
def test_files_that_are_named_exist(page):
    for name in set(re.findall(rf"(?<![\w/.-]){OF_REPOSITORY}", text_of(page))):
        assert (ROOT / name).exists(), name


def options_of(*names: str) -> set[str]:
    """Of a command, or of one in a group."""
    command = typer.main.get_command(application(list(names)))
    for name in names:
        command = command.commands[name]
    return {option for param in command.params for option in param.opts}


def named_in(line: str) -> list[str]:
    """The command that a line begins with: `neustream bench serve` is one of a group."""
    found = re.match(r"neustream ([a-z]+)\b(?: ([a-z-]+))?", line)
    if found is None:
        return []
    assert found[1] in COMMANDS, line
    if not hasattr(importlib.import_module(f"neustream.commands.{found[1]}"), "COMMANDS"):
        return [found[1]]
    return [each for each in found.groups() if each]


@EVERY_PAGE
def test_commands_and_their_options_exist(page):
    for line in commands(page):
        if names := named_in(line):
            given = set(re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", line))
            assert given <= options_of(*names), line


@EVERY_PAGE
def test_overrides_are_keys_that_there_are(page):
    """Each typed `neustream ... CONFIG --set ...` loads, but for traces that the reader has to bring."""
    for line in commands(page):
        found = re.match(r"neustream \w+ +(configs/\S+\.yaml)", line)
        if found is None:
            continue
        given = [value.strip("'") for value in re.findall(r"--set ('[^']*'|\S+)", line)]
        load_config(ROOT / found[1], given)


@EVERY_PAGE
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        if found := re.match(r"make ([a-z][\w -]*)$", line.strip()):
            assert set(found[1].split()) <= targets, line


def with_helpers(script):
    """The source of a script, and of those beside it that it imports from."""
    source = script.read_text()
    names = re.findall(r"^from ([\w.]+) import", source, re.MULTILINE)
    beside = [script.parent / f"{name.replace('.', '/')}.py" for name in names]
    return source + "".join(one.read_text() for one in beside if one.exists())


@EVERY_PAGE
def test_benchmarks_take_the_options_that_are_given(page):
    for line in commands(page):
        if found := re.search(r"python (benchmarks/\w+\.py)(.*)", line):
            source = with_helpers(ROOT / found[1])
            for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", found[2]):
                assert f'"{option}"' in source, line


WHOLE = [block for block in blocks("configs/README.md", "yaml") if block.startswith("name:")]


@pytest.mark.parametrize("block", WHOLE, ids=[block.splitlines()[0] for block in WHOLE])
def test_whole_configs_run(block, tmp_path):
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    config = tmp_path / "configs" / "one.yaml"
    config.parent.mkdir()
    config.write_text(block)
    models = load_config(config).models if "\nmodels:" in block else [""]
    few = [f"models.{name}.workload.requests=20" if name else "workload.requests=20" for name in models]
    loaded = load_config(config, few)
    prepared = prepare(loaded)
    for policy in loaded.policies:
        assert simulate(prepared, policy).submitted == 20 * len(few)
