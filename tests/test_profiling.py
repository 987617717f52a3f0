"""Stream modules measured, and what the engine adds to their steps."""

from __future__ import annotations

import json
import time
from functools import partial

import numpy as np
import pytest
from toys import command, draw_and_decode, table, toy

from neustream import (
    SLO,
    Graph,
    Pool,
    ProfileError,
    Request,
    Stage,
    StageFailed,
    load_profile,
    loop,
    measure,
    profiles_of,
    seq,
    switch,
)
from neustream.config import load_experiment
from neustream.engine.executor import BRIEF_ON_CPU_S
from neustream.experiment import prepare, simulate
from neustream.profiling import Measurement, default_batches, save
from neustream.profiling.costs import engine_costs
from neustream.profiling.measuring import LEAST_REPEATS, go_through


class Draw:
    """Adds a row for each round; checks that jobs come as they would in a real run."""

    def __init__(self):
        self.loaded, self.sizes, self.rounds = [], [], []

    def load(self, device):
        self.loaded.append(device)

    def step(self, jobs):
        self.sizes.append(len(jobs))
        self.rounds += [len(job.state.get("rows", ())) for job in jobs]
        return [{"rows": np.vstack([job.state.get("rows", np.zeros((0, 2))), np.ones((1, 2))])} for job in jobs]


class Decode(Draw):
    def step(self, jobs):
        self.sizes.append(len(jobs))
        self.rounds += [len(job.state["rows"]) for job in jobs]
        return [{"image": job.state["rows"].sum()} for job in jobs]


def sample(at):
    return {"steps": 3, "at": at}


def measured(graph=None, modules=None, **options):
    modules = modules or {"draw": Draw(), "decode": Decode()}
    return measure(graph or draw_and_decode(4, 2), modules, sample, **{"repeats": 3, "warmup": 1, **options})


# -- measuring ------------------------------------------------------------------------------------------


def test_each_stage_is_timed_at_each_batch():
    out = measured()
    assert {name: [m.batch for m in some] for name, some in out.items()} == {"draw": [1, 2, 3, 4], "decode": [1, 2]}
    for name, some in out.items():
        for m in some:
            assert m.stage == name
            assert len(m.seconds) == 3
            assert all(second > 0 for second in m.seconds)


def test_every_step_gets_as_many_jobs_as_its_batch():
    modules = {"draw": Draw(), "decode": Decode()}
    measured(modules=modules, batches=[2], repeats=5, warmup=2)
    assert modules["decode"].sizes == [2] * 7
    assert modules["draw"].sizes == [2] * (7 + 7 * 3)  # timed, and on their way to be decoded


def test_jobs_are_brought_to_a_stage_in_batches_that_those_in_front_may_have():
    modules = {"draw": Draw(), "decode": Decode()}
    measured(draw_and_decode(2, 5), modules, batches={"draw": [1], "decode": [5]}, warmup=0, repeats=1)
    assert modules["draw"].sizes == [1, 2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert modules["decode"].sizes == [5]


def test_jobs_get_to_a_later_stage_through_the_earlier_ones():
    modules = {"draw": Draw(), "decode": Decode()}
    measured(modules=modules)
    assert set(modules["decode"].rounds) == {3}


def test_jobs_stay_in_a_loop_for_its_rounds():
    modules = {"draw": Draw(), "decode": Decode()}
    measured(modules=modules, batches=[1], repeats=6, warmup=0)
    assert modules["draw"].rounds[:6] == [0, 1, 2, 0, 1, 2]


def test_modules_are_loaded_on_the_device():
    modules = {"draw": Draw(), "decode": Decode()}
    measured(modules=modules, device="toy:1")
    assert modules["draw"].loaded == modules["decode"].loaded == ["toy:1"]


def test_warmup_steps_are_not_timed():
    modules = {"draw": Draw(), "decode": Decode()}
    out = measured(modules=modules, batches=[1], repeats=4, warmup=3)
    assert len(out["decode"][0].seconds) == 4
    assert len(modules["decode"].sizes) == 7


def test_a_request_goes_through_all_stages_and_is_let_go_at_its_end():
    modules = {"draw": Draw(), "decode": Decode()}
    gone = []
    modules["decode"].release = gone.append
    go_through(draw_and_decode(4, 2), modules, sample(0), device="toy:1")
    assert (modules["draw"].loaded, modules["draw"].rounds, modules["decode"].rounds) == (["toy:1"], [0, 1, 2], [3])
    assert len(gone) == 1


def test_memory_that_one_request_lacks_on_its_way_is_an_error():
    class Full(Draw):
        def step(self, jobs):
            raise MemoryError("full")

    with pytest.raises(ProfileError, match=r"stage 'draw': out of memory at batch 1: full"):
        go_through(draw_and_decode(4, 2), {"draw": Full(), "decode": Decode()}, sample(0))


def test_a_stage_whose_time_is_over_is_repeated_no_more():
    out = measured(batches=[1, 2], repeats=9, warmup=1, seconds=0.0)
    assert {len(one.seconds) for some in out.values() for one in some} == {LEAST_REPEATS}
    out = measured(batches=[1, 2], repeats=9, warmup=1, seconds=1000.0)
    assert {len(one.seconds) for some in out.values() for one in some} == {9}


def test_the_device_is_waited_for_around_each_step():
    synced, graph = [], Graph("one", Stage("draw"))
    measured(graph, {"draw": Draw()}, batches=[1], repeats=3, warmup=1, sync=lambda: synced.append(1))
    assert len(synced) == 2 * 4


def test_each_step_is_told_and_batch_sizes_take_turns():
    told = []
    out = measured(tick=lambda *step: told.append(step), batches=[1, 2], repeats=3, warmup=1)
    draws = [(batch, seconds) for stage, batch, seconds in told if stage == "draw"]
    assert [batch for batch, _ in draws] == [1, 2] + [1, 2] * 3
    assert [seconds for batch, seconds in draws[2:] if batch == 2] == list(out["draw"][1].seconds)


def test_batches_beyond_a_stages_largest_are_left_out():
    out = measured(batches=[1, 3, 100])
    assert {name: [m.batch for m in some] for name, some in out.items()} == {"draw": [1, 3], "decode": [1]}


def test_loops_that_end_by_a_condition_are_measured_too():
    draw, decode = Stage("draw", max_batch=2), Stage("decode")
    graph = Graph("until", seq(loop(draw, until=lambda job: len(job.state["rows"]) >= 4, expect=2), decode))
    modules = {"draw": Draw(), "decode": Decode()}
    measured(graph, modules)
    assert set(modules["decode"].rounds) == {4}


class Small(Draw):
    """Runs out of memory above a batch of `most`."""

    def __init__(self, most, error=MemoryError):
        super().__init__()
        self.most, self.error = most, error

    def step(self, jobs):
        if len(jobs) > self.most:
            raise self.error(f"{len(jobs)} is too much")
        return super().step(jobs)


def test_out_of_memory_stops_a_stage_at_the_size_before():
    limits = []
    out = measured(
        draw_and_decode(16, 2),
        {"draw": Small(4), "decode": Decode()},
        on_limit=lambda stage, batch, error: limits.append((stage, batch, str(error))),
    )
    assert [m.batch for m in out["draw"]] == [1, 2, 3, 4]
    assert [m.batch for m in out["decode"]] == [1, 2]
    assert limits == [("draw", 6, "6 is too much")]


def test_memory_that_a_stage_lacks_does_not_limit_those_behind_it():
    out = measured(draw_and_decode(16, 8), {"draw": Small(3), "decode": Decode()})
    assert [m.batch for m in out["draw"]] == [1, 2, 3]
    assert [m.batch for m in out["decode"]] == [1, 2, 3, 4, 6, 8]


def test_out_of_memory_at_the_first_batch_is_an_error():
    with pytest.raises(ProfileError, match="stage 'draw': out of memory at batch 1: 1 is too much"):
        measured(modules={"draw": Small(0), "decode": Decode()})


def test_a_backend_says_what_out_of_memory_is():
    class CudaError(RuntimeError):
        pass

    modules = {"draw": Small(2, CudaError), "decode": Decode()}
    with pytest.raises(StageFailed, match=r"^stage 'draw': a step of 3 raised CudaError"):
        measured(modules=modules)
    out = measured(modules=modules, out_of_memory=(CudaError, MemoryError))
    assert [m.batch for m in out["draw"]] == [1, 2]


def test_samples_that_never_reach_a_stage_are_an_error():
    draw, extra = Stage("draw"), Stage("decode")
    graph = Graph("branch", seq(draw, switch(lambda job: "no", {"yes": extra, "no": seq()}, likely="yes")))
    with pytest.raises(ProfileError, match="never get to stage 'decode'"):
        measured(graph)


def test_a_wrong_number_of_results_is_an_error():
    class Short(Draw):
        def step(self, jobs):
            return super().step(jobs)[1:]

    with pytest.raises(StageFailed, match="returned 0 results for 1 jobs"):
        measured(modules={"draw": Short(), "decode": Decode()})


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (5, [1, 2, 3, 4, 5]),
        (16, [1, 2, 3, 4, 6, 8, 12, 16]),
        (20, [1, 2, 3, 4, 6, 8, 12, 16, 20]),
        (40, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]),
    ],
)
def test_default_batches(largest, sizes):
    assert default_batches(largest) == sizes


def test_a_measurement_sums_up_its_seconds():
    m = Measurement("draw", 2, (0.1, 0.2, 0.3, 0.4, 1.0))
    assert m.median == 0.3
    assert m.p90 == pytest.approx(0.76)
    assert m.spread == pytest.approx((0.4 - 0.2) / 0.3)


def test_profiles_without_a_detour_over_files():
    out = measured()
    profiles = profiles_of(out, device="toy device")
    assert profiles["draw"].device == "toy device"
    assert profiles["draw"].max_batch == 4
    assert [profiles["draw"].latency(m.batch) for m in out["draw"]] == [m.median for m in out["draw"]]


def test_what_was_measured_can_be_saved_and_loaded(tmp_path):
    out = measured()
    for path in save(out, tmp_path, model="toy", device="toy device", origin={}):
        profile, name = load_profile(str(path)), path.stem
        assert [profile.latency(m.batch) for m in out[name]] == [m.median for m in out[name]]


# -- the command ----------------------------------------------------------------------------------------


def test_neustream_profile_measures_and_writes_every_stage(tmp_path):
    path = toy(tmp_path, backend={"kind": "toy_backend:make", "limit": 2})
    done = command("profile", path, "--out", tmp_path / "new", "--repeats", 3, "--warmup", 1)
    assert done.status == 0
    assert "'draw': out of memory at batch 3, stops at the size before" in " ".join(done.err.split())
    draw, decode = (json.loads((tmp_path / f"new/{name}.json").read_text()) for name in ("draw", "decode"))
    assert (draw["batch"], decode["batch"]) == ([1, 2], [1, 2])
    assert (draw["model"], draw["device"]) == ("toy", "toy device")
    assert draw["origin"]["config"] == "toy"
    assert draw["origin"]["dtype"] == "float64"
    assert draw["origin"]["repeats"] == 3


# -- what the engine adds ---------------------------------------------------------------------------------


class Nap:
    """A step of 20 ms, which returns what it was given or fails."""

    def __init__(self, error=None):
        self.error, self.released = error, []

    def load(self, device):
        pass

    def step(self, inputs):
        time.sleep(0.02)
        if self.error:
            raise self.error
        return [{} for _ in inputs]

    def release(self, id):
        self.released.append(id)


def costs_of(nap, requests=3, profiled_s=0.02):
    graph = draw_and_decode(4, 2)
    profiles = {"draw": table("draw", *[profiled_s] * 4), "decode": table("decode", profiled_s, profiled_s)}
    asked = [partial(Request, f"r{at}", graph, at * 50.0, SLO(total=0.001), {"steps": 4}) for at in range(requests)]
    return engine_costs([Pool("gpu", tuple(graph.stages), 2)], profiles, {"draw": nap, "decode": nap}, asked, "cpu")


def test_what_the_engine_adds_to_steps_is_measured_by_serving_some():
    nap = Nap()
    costs = costs_of(nap)
    assert 0 < costs.handover_s < 0.02
    assert 0 < costs.decision_s + costs.decision_request_s + costs.decision_new_s < 0.02
    assert costs.alone_s == BRIEF_ON_CPU_S
    assert 0 < costs.call_s < 0.02
    assert costs.latency_scale >= 1
    assert set(nap.released) == {"r0", "r1", "r2"}  # what modules have beside `step` is called, too


def test_steps_that_take_longer_than_their_profile_when_served_are_seen():
    assert costs_of(Nap(), profiled_s=0.005).latency_scale > 3.9
    assert costs_of(Nap(), profiled_s=9.0).latency_scale == 1.0  # it returns before it is done


def test_a_model_that_fails_while_that_is_measured_is_an_error():
    with pytest.raises(StageFailed, match="serving the sample requests: stage 'draw': ValueError: no"):
        costs_of(Nap(ValueError("no")))


def test_profiles_say_what_the_engine_adds_and_configs_may_say_otherwise(tmp_path):
    path = toy(tmp_path)
    plain = prepare(load_experiment(path)).experiment.simulation
    assert (plain.handover_s, plain.decision_s, plain.call_s, plain.latency_scale) == (0.0, 0.0, 0.0, 1.0)
    for number, stage in enumerate(("draw", "decode")):
        file = next(tmp_path.rglob(f"{stage}.json"))
        engine = {"handover_s": 0.25 + number, "decision_s": 0.125, "call_s": 0.5, "latency_scale": 1.5 + number}
        engine |= {"alone_s": 4.0 + number, "decision_request_s": 2.0, "decision_new_s": 3.0 + number}
        file.write_text(json.dumps({**json.loads(file.read_text()), "engine": engine}))
    simulation = prepare(load_experiment(path)).experiment.simulation
    assert (simulation.handover_s, simulation.decision_s, simulation.latency_scale) == (0.25, 0.125, 1.5)
    assert simulation.alone_s == 4.0
    assert (simulation.decision_request_s, simulation.decision_new_s) == (2.0, 3.0)
    assert simulation.call_s == 0.5
    at_once = prepare(load_experiment(path, ["simulation.decision_s=0", "simulation.call_s=0"]))
    assert simulate(at_once, "serial").profile_error()["draw"] == pytest.approx(1.5 + 0.25 / 0.002)
    said = load_experiment(path, ["simulation.handover_s=0", "simulation.decision_s=0.5", "simulation.latency_scale=2"])
    simulation = prepare(said).experiment.simulation
    assert (simulation.handover_s, simulation.decision_s, simulation.latency_scale) == (0.0, 0.5, 2.0)
    assert not simulation.decision_request_s and not simulation.decision_new_s  # any decision takes what is said


@pytest.mark.parametrize("value", [-1, "x", None])
def test_costs_that_are_none_are_refused_by_name(tmp_path, value):
    path = toy(tmp_path)
    file = next(tmp_path.rglob("draw.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "engine": {"handover_s": value}}))
    with pytest.raises(ProfileError, match=r"draw.json: engine.handover_s: "):
        prepare(load_experiment(path))
