"""Language models of checkpoints, and profiles of their steps: measured, kept, fitted."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from texts import alone, model_of, prompts
from toys import Flat

import neustream
from neustream import serve
from neustream.backends.transformers import LanguageModel, measured
from neustream.backends.transformers.measured import cells_of, file_of, measure_steps
from neustream.core.steps import Step
from neustream.profiling.steps import load_steps, save_steps, steps_file, steps_of

MAX = 10


def test_a_checkpoint_from_disk_is_served(tmp_path):
    model_of("opt").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = {name: weight.clone() for name, weight in loaded.state_dict().items()}
    with neustream.serve(loaded, profile=Flat(), devices=["cpu"]) as running:
        done = running(prompts(1)[0], max_tokens=MAX)
    assert list(done.token_ids) == alone(model_of("opt"), prompts(1)[0], MAX)
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    assert alone(loaded, prompts(1)[0], MAX) == list(done.token_ids)  # the stock call works as ever


def test_profiles_are_measured_once_and_kept(tmp_path):
    model = model_of("opt", num_hidden_layers=1)
    with serve(model, slots=2, max_len=32, cache=tmp_path, measure_s=1.0) as running:
        assert running([3, 4, 5], max_tokens=4).on_time
    (path,) = tmp_path.rglob("steps.json")
    written = path.stat().st_mtime_ns
    with serve(model, slots=2, max_len=32, cache=str(tmp_path)) as running:
        assert running.profiles["llm.decode"].latency(1, 16) > 0
    with serve(model, slots=2, max_len=32, profile=str(path)) as running:
        assert running([3, 4, 5], max_tokens=4).on_time
    assert path.stat().st_mtime_ns == written


def test_a_machine_that_was_busy_while_a_model_was_measured_makes_no_promise_look_hopeless(tmp_path, monkeypatch):
    def held_up(model, **how):
        timed = measure_steps(model, **how)
        return [(step, [min(seconds), *[100.0] * 4]) for step, seconds in timed]

    monkeypatch.setattr(measured, "measure_steps", held_up)
    model = model_of("opt", num_hidden_layers=1)
    with serve(model, slots=2, max_len=32, cache=tmp_path, measure_s=0.2) as running:
        done = running.submit([3, 4, 5], max_tokens=4, slo=neustream.SLO(total=50.0)).outcome(60)
    assert done.status == "done"
    [path] = tmp_path.rglob("steps.json")
    assert load_steps(path).seconds(Step(decodes=1, context=16)) < 10


def test_measured_steps_make_a_profile(tmp_path):
    model = LanguageModel(model_of("llama", num_hidden_layers=1), slots=4, max_len=64)
    ticks = []
    timed = measure_steps(model, seconds=1.0, tick=lambda *told: ticks.append(told))
    kinds = {(step.prefills > 0, step.decodes > 0) for step, _ in timed}
    assert kinds == {(True, False), (False, True), (True, True)} and len(ticks) > len(timed)
    assert all(all(x > 0 for x in seconds) for _, seconds in timed)
    file = file_of(model, timed, "a test")
    assert file.origin["dtype"] == "float32" and file.origin["slots"] == 4
    save_steps(file, tmp_path / "steps.json")
    profile = steps_of(file)
    assert 0 < profile.seconds(Step(decodes=4, context=100)) < 1
    assert 0 < profile.seconds(Step(1, 32, 32 * 32)) < 1


@pytest.mark.parametrize(("slots", "length"), [(1, 2), (1, 96), (2, 5), (16, 2048)])
def test_what_is_measured_fits_the_slots(slots, length):
    cells = cells_of(slots, length)
    assert len(cells) == len(set(cells))
    for prompts_, contexts in cells:
        assert 1 <= len(prompts_) + len(contexts) <= max(slots, 1)
        assert all(1 <= n <= length for n in (*prompts_, *contexts))
    grid = {(len(contexts), sum(contexts)) for prompts_, contexts in cells if not prompts_}
    assert {batch for batch, _ in grid} >= {1, slots}


@pytest.mark.parametrize("apart", [False, True])
def test_how_prefill_and_decode_mix_is_chosen_by_what_was_measured(apart):
    def seconds(step):
        prefill = (0.004 + 1e-4 * step.tokens) if step.prefills else 0.0
        decode = (0.004 + 1e-4 * step.decodes) if step.decodes else 0.0
        return prefill + decode - (0.004 if prefill and decode and not apart else 0.0)

    steps = [Step(1, n, n * n) for n in (1, 16, 64, 256)]
    steps += [Step(0, 0, 0, b, b * c) for b in (1, 4, 16) for c in (16, 64)]
    mixed = [Step(1, n, n * n, b, b * 32) for n in (16, 64, 128) for b in (1, 16)]
    file = steps_file([(step, [seconds(step)]) for step in steps + mixed], model="m", device="d", origin={})
    assert file.sequential == apart and math.isclose(file.mixed, 1.0, rel_tol=0.02)
    profile = steps_of(file)
    assert all(math.isclose(profile.seconds(step), seconds(step), rel_tol=0.06) for step in mixed)
