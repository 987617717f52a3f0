"""Everything in Python that takes a path takes it as a text and as a Path."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import toy

from neustream import EventLog, load_profile
from neustream.analysis.plots import plot_batches, plot_served, plot_sweep
from neustream.backends.diffusers.from_config import Options as PipelineOptions
from neustream.backends.measuring import profile_steps
from neustream.backends.serving import Gallery
from neustream.backends.transformers.from_config import Options as TextOptions
from neustream.backends.vllm.settings import load as load_settings
from neustream.config import load_experiment
from neustream.config.yaml_file import read_document
from neustream.experiment import pipeline_of, prepare, record, simulate
from neustream.experiment.sweeping import batches_of
from neustream.profiling import Measurement, load_stage, save
from neustream.profiling.steps import load_steps, save_steps
from neustream.workload import Row, Trace, take, write_trace

STEPS = Path(__file__).parent.parent / "profiles/a6000/opt_13b/steps.json"
MEASURED = {"draw": [Measurement("draw", 1, (0.1, 0.2))]}
LOG = EventLog()


def records(folder):
    experiment = load_experiment(toy(folder))
    entry = record(experiment, "fcfs", simulate(prepare(experiment), "fcfs"))
    return [{**entry, "over": "workload.rate", "value": 1.0, "simulated": entry}]


READ = {
    "load_experiment": lambda path, folder: load_experiment(path(toy(folder))),
    "read_document": lambda path, folder: read_document(path(toy(folder))),
    "load_profile": lambda path, folder: load_profile(path(toy(folder).parent / "profiles/draw.json")),
    "load_stage": lambda path, folder: load_stage("draw", [path(toy(folder).parent / "profiles/draw.json")]),
    "load_steps": lambda path, folder: load_steps(path(STEPS)),
    "Trace": lambda path, folder: take(Trace(path(traced(folder)))),
    "vllm settings": lambda path, folder: load_settings({"neustream": {"config": path(settings(folder))}}),
    "vllm profile": lambda path, folder: load_settings({"neustream": {"profile": path(STEPS)}}),
    "diffusers checkpoint": lambda path, folder: PipelineOptions(checkpoint=path(folder)),
    "transformers checkpoint": lambda path, folder: TextOptions(checkpoint=path(folder)),
}
WRITE = {
    "EventLog.save": lambda path: LOG.save(path),
    "save": lambda path: save(MEASURED, path, model="m", device="d", origin={}),
    "write_trace": lambda path: write_trace(
        f"{path}.csv" if isinstance(path, str) else path.with_suffix(".csv"), [Row(1.0)]
    ),
    "save_steps": lambda path: save_steps(steps(), path),
    "plot_sweep": lambda path: plot_sweep(records(Path(path).parent.parent), "workload.rate", ["fcfs"], "t", path),
    "plot_batches": lambda path: plot_batches({"fcfs": batches_of(LOG, "draw")}, "draw", "t", f"{path}.png"),
    "plot_served": lambda path: plot_served(records(Path(path).parent.parent), "t", f"{path}.png"),
}


def traced(folder):
    path = folder / "t.csv"
    path.write_text("arrival_s\n1\n")
    return path


def settings(folder):
    path = folder / "s.yaml"
    path.write_text("policy: fcfs\n")
    return path


def steps():
    from neustream.profiling.steps import StepsFile

    return StepsFile.model_validate_json(STEPS.read_bytes())


@pytest.mark.parametrize("path", [str, Path])
@pytest.mark.parametrize("what", READ)
def test_what_is_read(tmp_path, what, path):
    assert READ[what](path, tmp_path)


@pytest.mark.parametrize("path", [str, Path])
@pytest.mark.parametrize("what", WRITE)
def test_what_is_written_and_the_folders_in_front_of_it(tmp_path, what, path):
    WRITE[what](path(tmp_path / "new/deep"))
    assert list((tmp_path / "new").rglob("*.*")) or (tmp_path / "new/deep").is_file()


class Served:
    """Steps of a language model, which was measured before."""

    def load(self, device):
        pass

    def step(self, inputs):
        return [{"ended": False} for _ in inputs]


class Backend:
    modules = dict.fromkeys(("llm.prefill", "llm.decode", "llm"), Served())
    model_name, dtype, device_name, out_of_memory = "a model", "float32", "here", (MemoryError,)

    def params(self, at):
        return {}

    def check(self, params):
        pass

    def sync(self):
        pass

    def steps(self, seconds, tick):
        return steps()

    def image(self, value):
        return None


@pytest.mark.parametrize("path", [str, Path])
def test_where_a_backends_steps_and_pictures_go(tmp_path, path):
    config = STEPS.parents[3] / "configs/paper/opt_13b_a6000.yaml"
    experiment = load_experiment(config, ["backend={kind: 'test_paths:make'}"])
    profile_steps(pipeline_of(experiment), "cpu", path(tmp_path / "new"), 1.0, lambda stage, batch, seconds: None)
    assert (tmp_path / "new/steps.json").exists()
    assert not Gallery().save(path(tmp_path / "none.png"))


def make(options, device):
    return Backend()
