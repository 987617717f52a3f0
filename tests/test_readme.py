"""The READMEs are short and whole, and their code runs."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from pages import CHECKPOINT, PAGES, ROOT, blocks, text_of

from neustream.config import load_experiment


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
