"""What the READMEs say is so: their code runs; files, links, commands, keys and options that they name exist."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from neustream import POLICIES
from neustream.cli import COMMANDS, application
from neustream.config import (
    LlmExperiment,
    ModelsConfig,
    StagesExperiment,
    StepsWorkload,
    TokensWorkload,
    load_config,
    load_experiment,
)
from neustream.config.fields import Between
from neustream.config.schema import KINDS, LlmModel, StagesModel
from neustream.experiment import prepare, simulate

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/policy_notes.md",
    "configs/README.md",
    "profiles/README.md",
    "neustream/README.md",
    "neustream/analysis/bounds/README.md",
    "neustream/bench/README.md",
    "neustream/backends/diffusers/README.md",
    "neustream/backends/transformers/README.md",
    "neustream/backends/vllm/README.md",
    "neustream/cluster/README.md",
    "neustream/core/policies/README.md",
    "neustream/server/README.md",
]
OF_REPOSITORY = r"(?:configs|benchmarks|tests|neustream|profiles|\.ci)/[\w./-]*\w\.(?:yaml|py|sh|png|md|json)"
CHECKPOINT = "path/to/checkpoint"
EVERY_PAGE = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks that are marked with exactly `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines that a reader would type: indented ones, and those in backticks; comments left out."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def test_no_page_is_forgotten():
    own = [
        path for folder in ("benchmarks", "configs", "profiles", "neustream") for path in (ROOT / folder).rglob("*.md")
    ]
    found = {str(path.relative_to(ROOT)) for path in [*own, *ROOT.glob("*.md")]}
    assert {page for page in found if not page.startswith("benchmarks/results/")} == set(PAGES)


def test_the_readme_is_short():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


def test_its_results_are_one_table_with_one_number_a_cell():
    section = text_of("README.md").partition("\n## Results\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    assert 1 <= len(rows) <= 8
    for _, *cells in rows:
        assert all(re.fullmatch(r" (\d+(\.\d+)?|-) ", cell) for cell in cells), cells


# -- code ---------------------------------------------------------------------------------------------


RUN = [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))]


def test_three_examples_are_in_the_readme_and_all_run():
    assert len(blocks("README.md", "python")) == 3
    assert blocks("README.md", "python no-run") == []
    pipeline, language, graph = (len(re.findall(r"\S.*", block)) for block in blocks("README.md", "python"))
    assert pipeline <= 10 and language <= 10 and graph < 40


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real pipelines and models, tiny, saved to disk as people have them; made when they are asked for."""
    return {kind: tmp_path_factory.mktemp(kind) for kind in ("diffusers", "transformers")}


def save_pipeline(folder: Path) -> None:
    from neustream.backends.diffusers.from_config import Options, build

    experiment = load_experiment(ROOT / "configs/demo/sd_tiny.yaml")
    assert experiment.backend is not None
    build(Options(**experiment.backend.options)).save_pretrained(folder)


def save_language_model(folder: Path) -> None:
    import torch

    from neustream.backends.transformers.from_config import Options, build, byte_tokenizer

    experiment = load_experiment(ROOT / "configs/demo/opt_tiny.yaml")
    assert experiment.backend is not None
    build(Options(**experiment.backend.options), torch.device("cpu")).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(("page", "number"), RUN, ids=[f"{page}:{number}" for page, number in RUN])
def test_python_blocks_run(page, number, tmp_path, monkeypatch, checkpoints, capfd):
    code = blocks(page, "python")[number]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    if CHECKPOINT in code:
        of_images = "import DiffusionPipeline" in code
        kind, save = ("diffusers", save_pipeline) if of_images else ("transformers", save_language_model)
        pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
        run_on_checkpoint(code, tmp_path, checkpoints[kind], save, monkeypatch)
    else:
        (tmp_path / "block.py").write_text(code)
        command = [sys.executable, "-W", "error", "block.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        if (page, number) == ("README.md", 2):
            assert done.stdout.endswith(" of 12 on time\n")


def run_on_checkpoint(code, folder, checkpoint, save, monkeypatch):
    """Run a block with `checkpoint` in the place of the reader's own, measured for less long than by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both libraries' own, when they are imported
        from neustream.backends.diffusers import PipelineMount
        from neustream.backends.transformers import TextMount

        for mount in (PipelineMount, TextMount):
            monkeypatch.setitem(mount.__init__.__kwdefaults__, "measure_s", 2.0)
        if not any(checkpoint.iterdir()):
            save(checkpoint)
        path = folder / "block.py"
        path.write_text(code.replace(CHECKPOINT, str(checkpoint)))
        left = runpy.run_path(str(path))
    report = left["service"].report
    assert report.counts["on_time"] + report.counts["late"] == report.submitted > 0
    if "answers" in left:
        assert len(list(folder.glob("lighthouse-*.png"))) == len(left["answers"])


# -- names --------------------------------------------------------------------------------------------


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


@EVERY_PAGE
def test_benchmarks_take_the_options_that_are_given(page):
    for line in commands(page):
        if found := re.search(r"python (benchmarks/\w+\.py)(.*)", line):
            source = (ROOT / found[1]).read_text()
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


# -- tables that are complete -------------------------------------------------------------------------


def first_cells(text: str) -> list[str]:
    """The names in backticks in the first cells of a text's tables."""
    return [
        name for cell in re.findall(r"^\|([^|]*)\|", text, re.MULTILINE) for name in re.findall(r"`([\w.]+)`", cell)
    ]


def test_the_table_of_policies_is_complete():
    assert sorted(first_cells(text_of("neustream/core/policies/README.md"))) == sorted(POLICIES)


def sections() -> dict[str, list[type[BaseModel]]]:
    """The sections of configs of all kinds, by the headings that they have in configs/README.md."""
    found: dict[str, list[type[BaseModel]]] = {}

    def add(heading: str, model: type[BaseModel], before: str = "") -> None:
        if model in found.setdefault(heading, []):
            return
        found[heading].append(model)
        for key, hint in typing.get_type_hints(model).items():
            for part, ending in parts_of(hint):
                name = f"{before}{key}{ending}"
                add(name, part, "" if name == "models.NAME" else f"{name}.")  # sections of models are described once

    for kind in KINDS:
        add("Top of a file with one model", kind)
    add("Top of a file with several models", ModelsConfig)
    return found


def parts_of(hint: object, ending: str = "") -> list[tuple[type[BaseModel], str]]:
    """The sections in a type, with what their heading ends with; drawn numbers have no heading of their own."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [(hint, ending)] if hint.__module__ != Between.__module__ else []
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return parts_of(arguments[1], ending + ".NAME")
    return [part for one in arguments for part in parts_of(one, ending + "[]" if origin is list else ending)]


OF_ONE_KIND = {
    StagesExperiment: "(stages)",
    StagesModel: "(stages)",
    LlmModel: "(llm)",
    StepsWorkload: "(stages)",
    LlmExperiment: "(llm)",
    TokensWorkload: "(llm)",
}
"""What the row of a key says that only one kind of config has."""


def number(value: float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        value = int(value)
    if isinstance(value, int):
        power = value >= 2**20 and value & (value - 1) == 0
        return f"2^{value.bit_length() - 1}" if power else f"{value:,}"
    return re.sub(r"e([+-])0?", lambda sign: "e" + sign[1].strip("+"), f"{value:g}")


def section_of(heading: str) -> str:
    page = text_of("configs/README.md")
    (section,) = re.findall(rf"^### `?{re.escape(heading)}`?\n(.*?)(?=^#|\Z)", page, re.DOTALL | re.MULTILINE)
    return section


def said_of(heading: str) -> dict[str, tuple[str, str]]:
    """Key -> default and what is allowed, as a section's table in configs/README.md has them."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*?) ?\| ([^|]*) \|", section_of(heading), re.MULTILINE)
    assert len(rows) == len({key for key, _, _ in rows})
    return {key: (default, allowed) for key, default, allowed in rows}


@pytest.mark.parametrize("heading", sections())
def test_the_keys_of_configs_are_all_there_with_their_defaults_and_limits(heading):
    models, said = sections()[heading], said_of(heading)
    fields = {key: (model, field) for model in models for key, field in model.model_fields.items()}
    assert sorted(said) == sorted(fields)
    for key, (model, field) in fields.items():
        if not all(key in each.model_fields for each in models):
            row = re.search(rf"^\| `{key}` .*$", section_of(heading), re.MULTILINE)[0]
            assert OF_ONE_KIND[model] in row
        properties = model.model_json_schema()["properties"]
        default, allowed = said[key]
        if field.is_required():
            assert default == "required"
        elif field.default is None or isinstance(field.default, bool):
            assert default == {None: "none", True: "true", False: "false"}[field.default]
        elif isinstance(field.default, int | float):
            assert default == number(field.default)
        elif isinstance(field.default, str):
            assert default == (f"`{field.default}`" if field.default else '""')
        for part in (properties[key], *properties[key].get("anyOf", [])):
            for limit in ("minimum", "maximum", "exclusiveMaximum"):
                assert limit not in part or number(part[limit]) in allowed.split(), key


def test_numbers_are_written_as_people_do():
    assert [number(n) for n in (1, 0.001, 1e-6, 1e9, 1e13, 10**7, 2**20, 2**32, 5.0)] == [
        "1", "0.001", "1e-6", "1e9", "1e13", "10,000,000", "2^20", "2^32", "5",
    ]  # fmt: skip


def options_of_backends() -> dict[str, tuple[list[str], list[str]]]:
    """By page, the options that need a row in one of its tables, and the arguments of `submit`."""
    from neustream.backends.diffusers import PipelineMount, from_config
    from neustream.backends.transformers import TextMount
    from neustream.backends.transformers import from_config as of_texts

    def keywords(function: Callable[..., object]) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    images = [*keywords(PipelineMount), *from_config.Options.model_fields]
    texts = ["tokenizer", "prompt", *keywords(TextMount), *of_texts.Options.model_fields]
    return {
        "neustream/backends/diffusers/README.md": (images, keywords(PipelineMount.request)),
        "neustream/backends/transformers/README.md": (texts, keywords(TextMount.request)),
    }


def test_all_options_of_served_models_are_named():
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pages = options_of_backends()
    for page, (options, of_submit) in pages.items():
        assert set(options) - set(first_cells(text_of(page))) == set(), page
        assert set(of_submit) - set(re.findall(r"`([a-z_]+)`", text_of(page))) == set(), page


def test_all_settings_inside_vllm_are_named():
    from neustream.backends.vllm.settings import DefaultSLO, Settings
    from neustream.backends.vllm.slo_args import KEYS

    page = text_of("neustream/backends/vllm/README.md")
    assert set(Settings.model_fields) <= set(first_cells(page))
    assert {*DefaultSLO.model_fields, *KEYS, "config"} <= set(re.findall(r"`([a-z_]+)`", page))
