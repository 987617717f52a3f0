"""Configs whose workload is a trace: pipelines and language models, promises, and what is missing."""

from __future__ import annotations

import json

import pytest
from files import AZURE_2023, AZURE_LMM, CONVERSATIONS, DIFFUSIONDB, MOONCAKE, VLLM_OMNI, put, tokenizer
from toys import command, toy

from neustream import ConfigError
from neustream.config import load_experiment
from neustream.experiment import prepare, simulate

STEP, DECODE = 0.002, 0.001  # solo latencies of the toy profiles


def prepared(folder, content, *overrides, slo=None, **load):
    put(folder, content)
    path = toy(folder, workload={"trace": "trace", **load}, slo=slo or {"total_s": 30})
    return prepare(load_experiment(path, overrides))


@pytest.fixture
def llm(root, tmp_path):
    """A paper config of a language model on a trace."""

    def make(content, *overrides, slo="slo={first_s: 1, step_s: 0.1}"):
        trace = put(tmp_path, content)
        drop = [f"workload.{key}=null" for key in ("rate", "cv", "requests", "prompt", "output", "max_tokens")]
        path = root / "configs/paper/opt_13b_a6000.yaml"
        given = yaml_without(path, tmp_path, drop)
        return prepare(load_experiment(given, [f"workload.trace={trace}", slo, *overrides]))

    return make


def yaml_without(path, folder, drop):
    import yaml

    raw = yaml.safe_load(path.read_text())
    raw["profiles"] = str(path.parent / raw["profiles"])
    raw["workload"] = {"seed": 0}
    raw["sweeps"] = {}
    copy = folder / "llm.yaml"
    copy.write_text(yaml.safe_dump(raw))
    return copy


def steps_of(some):
    return [request.params["steps"] for request in some.requests]


# -- pipelines ------------------------------------------------------------------------------------


def test_requests_of_the_normal_form(tmp_path):
    content = "arrival_s,steps,slo_ms,params.prompt\n0.5,,,cat\n1.0,6,,dog\n1.5,,9500,owl\n"
    some = prepared(tmp_path, content, slo={"scale": 2}, steps=2)
    assert [request.arrival for request in some.requests] == [0.0, 0.5, 1.0]
    assert [request.id for request in some.requests] == ["toy-0", "toy-1", "toy-2"]
    assert steps_of(some) == [2, 6, 2]
    totals = [request.slo.total for request in some.requests]
    assert totals == pytest.approx([2 * (2 * STEP + DECODE), 2 * (6 * STEP + DECODE), 9.5])
    assert [request.params["prompt"] for request in some.requests] == ["cat", "dog", "owl"]


def test_steps_that_a_trace_leaves_out_are_drawn_as_without_it(tmp_path):
    import numpy as np

    lines = ["arrival_s,steps", *(f"{at},{'' if at % 2 else 50}" for at in range(40))]
    steps = steps_of(prepared(tmp_path, "\n".join(lines), steps={"min": 1, "max": 4}))
    assert set(steps[::2]) == {50}
    np.random.seed(0)
    assert steps[1::2] == np.random.randint(1, 5, 40).tolist()[1::2]


@pytest.mark.parametrize(("content", "steps"), [(VLLM_OMNI, [20, 50]), (DIFFUSIONDB, [50, 25])])
def test_public_traces_of_diffusion_are_simulated(tmp_path, content, steps):
    some = prepared(tmp_path, content)
    assert steps_of(some) == steps
    assert some.requests[0].params["height"] > some.requests[0].params["width"]
    assert any("sizes differ; in simulations a step takes as long at each" in note for note in some.notes)
    report = simulate(some, "fcfs")
    assert report.counts["on_time"] == 2


def test_promises_come_from_the_file_or_else_from_the_config(tmp_path):
    first, second = prepared(tmp_path, VLLM_OMNI, slo={"total_s": 7}).requests
    assert (first.slo.total, second.slo.total) == (0.8, 7.0)


def test_a_row_may_name_its_class(tmp_path):
    classes = {"classes": [{"name": "gold", "total_s": 1, "weight": 5}, {"name": "plain", "scale": 4}]}
    content = "arrival_s,slo_class,slo_s\n0,gold,\n1,plain,\n2,gold,3\n3,,\n"
    some = prepared(tmp_path, content, slo=classes, steps=2)
    assert [request.slo.name for request in some.requests][:3] == ["gold", "plain", "gold"]
    assert [request.slo.total for request in some.requests][:3] == pytest.approx([1, 4 * (2 * STEP + DECODE), 3])
    assert some.requests[2].slo.weight == 5
    with pytest.raises(ConfigError, match=r"line 2: slo_class 'golt' is no class .*; did you mean 'gold'"):
        prepared(tmp_path, "arrival_s,slo_class\n0,golt\n", slo=classes, steps=2)


def test_a_trace_of_a_language_model_on_a_pipeline_needs_steps(tmp_path):
    with pytest.raises(ConfigError) as wrong:
        prepared(tmp_path, AZURE_2023)
    assert str(wrong.value) == (
        f"trace {tmp_path / 'trace'}, line 2: no steps, which this config's stages ask for; "
        "give workload.steps for rows without it, as in steps: 50"
    )
    some = prepared(tmp_path, AZURE_2023, steps=5)
    assert steps_of(some) == [5, 5, 5]
    assert some.notes == [f"trace {tmp_path / 'trace'}: not used by this config: prompt_tokens, output_tokens"]


def test_a_column_that_a_stage_counts_by(tmp_path):
    put(tmp_path, "arrival_s,frames,params.rounds\n0,3,2\n1,4,\n")
    stages = {"draw": {"times": "frames", "max_batch": 4}, "decode": {"times": "rounds", "max_batch": 2}}
    path = toy(tmp_path, stages=stages, workload={"trace": "trace"})
    with pytest.raises(
        ConfigError, match=r"trace .*trace, line 3: 'rounds' is what a stage's `times` ask for, .* None"
    ):
        prepare(load_experiment(path))
    (first,) = prepare(load_experiment(path, ["workload.requests=1"])).requests
    assert (first.params["frames"], first.params["rounds"]) == (3, 2)


def test_promises_of_tokens_are_for_language_models(tmp_path):
    with pytest.raises(ConfigError, match=r"line 3: promises of tokens \(slo_ttft_\*, slo_tpot_\*\) are for an llm"):
        prepared(tmp_path, "arrival_s,slo_ttft_ms\n0,\n1,200\n", steps=3)


def test_requests_are_at_most_as_many_as_there_are_rows(tmp_path):
    content = "arrival_s\n1\n2\n3\n"
    assert len(prepared(tmp_path, content, steps=1).requests) == 3
    assert len(prepared(tmp_path, content, "workload.requests=2", steps=1).requests) == 2
    with pytest.raises(ConfigError, match=r"workload.requests is 4, but .*trace has 3 rows to take"):
        prepared(tmp_path, content, "workload.requests=4", steps=1)


def test_windows_and_speed_of_a_config(tmp_path):
    content = "arrival_s,steps\n" + "".join(f"{at},{at}\n" for at in range(20))
    some = prepared(tmp_path, content, start_s=3, duration_s=5, speed=2)
    assert steps_of(some) == [3, 4, 5, 6, 7]
    assert [request.arrival for request in some.requests] == [0, 0.5, 1, 1.5, 2]


def test_columns_that_a_config_uses(tmp_path):
    some = prepared(tmp_path, DIFFUSIONDB, columns=["steps", "params.seed"])
    assert [dict(request.params) for request in some.requests] == [
        {"seed": 2615452550, "steps": 50},
        {"seed": 11, "steps": 25},
    ]
    with pytest.raises(ConfigError, match=r"workload.columns: 'stpes' is not in .*; did you mean 'steps'"):
        prepared(tmp_path, DIFFUSIONDB, columns=["stpes"])


def test_a_trace_is_the_same_requests_each_time(tmp_path):
    first, again = (prepared(tmp_path, VLLM_OMNI) for _ in range(2))
    assert [(r.id, r.arrival, r.slo, r.params) for r in first.requests] == [
        (r.id, r.arrival, r.slo, r.params) for r in again.requests
    ]


# -- language models ------------------------------------------------------------------------------


def test_public_traces_of_language_models_are_simulated(llm):
    for content, prompts, outputs in (
        (AZURE_2023, [374, 396, 7], [44, 109, 1]),
        (MOONCAKE, [700, 90], [500, 490]),
        (AZURE_LMM, [20, 900], [7, 8]),
    ):
        some = llm(content)
        assert [request.params["prompt_tokens"] for request in some.requests] == prompts
        assert list(some.lengths.values()) == outputs
        assert {request.params["max_tokens"] for request in some.requests} == {max(outputs)}
        assert simulate(some, "priced").tokens.outputs == sum(outputs)


def test_what_the_model_does_not_use_is_said(llm):
    (note,) = llm(AZURE_LMM).notes
    assert note.endswith("trace: not used by this config: images")
    (note,) = llm(MOONCAKE).notes
    assert note.endswith("trace: not used by this config: hash_ids")


def test_max_tokens_of_a_config_cut_the_outputs(llm):
    some = llm(AZURE_2023, "workload.max_tokens=50")
    assert list(some.lengths.values()) == [44, 50, 1]
    assert {request.params["max_tokens"] for request in some.requests} == {50}


def test_promises_of_tokens_from_the_file(llm):
    content = "arrival_s,prompt_tokens,output_tokens,slo_ttft_ms,slo_tpot_ms,slo_ms\n0,9,5,200,50,\n1,9,5,,,4000\n"
    first, second = (request.slo for request in llm(content).requests)
    assert (first.first, first.step, first.total) == (0.2, 0.05, float("inf"))
    assert (second.first, second.step, second.total) == (1.0, 0.1, 4.0)
    with pytest.raises(ConfigError, match=r"line 2: slo_tpot_\* needs slo_ttft_\*"):
        llm("arrival_s,prompt_tokens,output_tokens,slo_tpot_ms\n0,9,5,50\n", slo="slo={total_s: 3}")


def test_a_trace_of_diffusion_on_a_language_model_needs_lengths(llm):
    with pytest.raises(ConfigError, match=r"line 1: no prompt_tokens, .*; give workload.prompt .* prompt: 512"):
        llm(VLLM_OMNI)
    with pytest.raises(ConfigError, match=r"line 1: no output_tokens, .*; give workload.output .* output: 128"):
        llm(VLLM_OMNI, "workload.prompt=9")
    some = llm(VLLM_OMNI, "workload.prompt=9", "workload.output=7")
    assert list(some.lengths.values()) == [7, 7]


def test_sharegpt_has_drawn_arrivals(llm, tmp_path):
    pytest.importorskip("tokenizers")
    words = tokenizer(tmp_path)
    content = json.dumps(CONVERSATIONS)
    name = f"workload.tokenizer={words}"
    with pytest.raises(ConfigError, match=r"has no arrivals: draw them, by workload.arrivals \(gamma or constant\)"):
        llm(content, name)
    some = llm(content, name, "workload.arrivals=constant", "workload.rate=2")
    assert [request.arrival for request in some.requests] == [0.5, 1.0]
    assert [request.params["prompt_tokens"] for request in some.requests] == [3, 1]


def test_a_trace_with_arrivals_does_not_go_with_drawn_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"brings its arrivals: arrivals, rate do not go with it; drop it: --set workload.arr"
    ):
        prepared(tmp_path, VLLM_OMNI, arrivals="gamma", rate=3)


# -- the command ----------------------------------------------------------------------------------


def test_a_simulation_says_how_its_trace_was_read(tmp_path):
    put(tmp_path, DIFFUSIONDB)
    done = command("simulate", toy(tmp_path, workload={"trace": "trace"}))
    assert done.status == 0
    assert "columns not used: 'image_name', 'image_nsfw'" in done.err


def test_a_wrong_row_is_one_line_and_status_2(tmp_path):
    put(tmp_path, "arrival_s,steps\n0,3\n1,-3\n")
    done = command("simulate", toy(tmp_path, workload={"trace": "trace"}))
    assert done.status == 2
    assert done.err.strip().endswith("trace, line 3: column 'steps' is '-3'; allowed: a whole number from 0 to 1000000")
