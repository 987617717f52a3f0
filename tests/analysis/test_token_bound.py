"""The bound for language models: below it are all schedules that policies, subsets and chance come up with."""

from __future__ import annotations

import itertools
import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import yaml
from exhaustive_tokens import draw, optimum
from toys import one_stage, request

from neustream import ConfigError, Decision, GraphError, LinearProfile, Pool, ProfileError
from neustream.analysis.bounds import token_bound
from neustream.analysis.bounds.tokens import buckets, upper
from neustream.analysis.bounds.tokens.costs import Limits, costs_of
from neustream.analysis.headroom import bound_of, weight_on_time
from neustream.analysis.hindsight import TEXT_STARTS, hindsight
from neustream.config import load_experiment
from neustream.core.learnt_steps import LearntSteps
from neustream.core.steps import DecodeGrid, PrefillTable, Step, StepProfile
from neustream.experiment import prepare, simulate

INSTANCES = int(os.environ.get("NEUSTREAM_TOKEN_INSTANCES", "30"))
"""How many random loads to search exhaustively; 2,000 take some minutes."""
SERVE = ("fcfs", "edf", "priority", "sarathi", "neustream_llm", "priced")
PREFILL = {
    "tokens": [16, 32, 64, 96, 128, 256],
    "latency_s": [0.04, 0.042, 0.05, 0.048, 0.06, 0.1],
    "fit": [0.01, 4e-4, 1e-8],
}
LINEAR = {"fit": [0.04, 1e-4, 2e-6]}
GRID = {
    "batch": [1, 4, 16],
    "context": [16, 128],
    "latency_s": [[0.04, 0.041], [0.043, 0.042], [0.045, 0.05]],
    "fit": [0.04, 2e-4, 1e-6],
}


def chat(folder, overrides=(), **other):
    """A small experiment: a dozen chats in a second or two."""
    steps = {"format": "neustream.profile/1", "kind": "steps", "stage": "llm", "device": "toy", "origin": {}}
    steps |= {"prefill": PREFILL, "decode": GRID if other.pop("grid", False) else LINEAR} | other
    (folder / "steps.json").write_text(json.dumps(steps))
    config = {
        "name": "chat",
        "profiles": str(folder),
        "llm": {"max_batch": 8, "memory": {"tokens": 2048, "block": 16}},
        "workload": {
            "requests": 12,
            "rate": 8,
            "cv": 2,
            "prompt": {"median": 60, "sigma": 1.0, "min": 4, "max": 200},
            "output": {"median": 8, "sigma": 0.8, "min": 1, "max": 30},
            "max_tokens": 30,
        },
        "slo": {"first_scale": 2.5, "step_scale": 1.4},
    }
    path = folder / "chat.yaml"
    path.write_text(yaml.safe_dump(config))
    return prepare(load_experiment(path, list(overrides)))


SLOW = "slo={first_scale: 3, step_scale: 2}"
VARIANTS = [
    ([], {}),
    (["workload.rate=30"], {"mixed": 0.8}),
    (["workload.rate=15", "llm.memory={tokens: 320}"], {"grid": True}),
    (["workload.rate=20", "slo={total_s: 1.0}"], {"sequential": True}),
    (["slo={first_s: 0.3}", "workload.rate=30", "llm.memory=null"], {"sequential": True, "mixed": 0.7, "grid": True}),
    (["simulation.latency_scale=1.3", "simulation.handover_s=0.01", SLOW], {}),
    (["slo={classes: [{first_scale: 2, step_scale: 1.3, weight: 2.5}, {total_s: 0.9}]}", "workload.rate=30"], {}),
]


@pytest.mark.parametrize(("overrides", "other"), VARIANTS)
def test_no_policy_serves_more(tmp_path, overrides, other):
    for seed in range(2):
        busy = chat(tmp_path, [*overrides, f"workload.seed={seed}"], **other)
        most = bound_of(busy, 3)
        assert most.value <= most.relaxed + 1e-6
        for name in SERVE:
            assert weight_on_time(simulate(busy, name)) <= most.value + 1e-6, f"{name}, seed {seed}"


def bound_on(load, seconds=5.0):
    return token_bound(
        load.requests, load.lengths, load.steps, load.pool, max_batch=load.max_batch, time_limit_s=seconds
    )


def test_no_schedule_serves_more_than_the_bound():
    exact = 0
    for seed in range(INSTANCES):
        load = draw(seed)
        best, found = optimum(load), bound_on(load)
        assert best <= found.value + 1e-6, f"seed {seed}: {best} can be served, the bound is {found}"
        assert found.value <= found.relaxed + 1e-6, f"seed {seed}: {found}"
        exact += found.value <= best + 1e-6
    assert exact >= 0.6 * INSTANCES


def test_starts_of_prompts_wait_for_decodes(monkeypatch):
    """Seed 4: prompts fit beside each other, and decodes too, but not both."""
    load = draw(4)
    assert optimum(load) == bound_on(load).value == 1
    monkeypatch.setattr(upper, "LINKED", ())
    assert bound_on(load).value == 2


def test_buckets_that_end_at_deadlines_are_tighter(monkeypatch):
    load = draw(27)
    assert optimum(load) == bound_on(load).value == 2
    monkeypatch.setattr(buckets, "EXACT", 0)
    assert bound_on(load).value == 3


def test_a_small_program_of_time_is_solved_with_whole_tasks(monkeypatch):
    load = draw(5)
    assert optimum(load) == bound_on(load).value == 1
    monkeypatch.setattr(upper, "WHOLE", 0)
    assert bound_on(load).value == 2


class Chance:
    """Any jobs, in any order, and any part of their prompts."""

    def __init__(self, seed, part):
        self.draw, self.part = random.Random(seed), part

    def decide(self, view):
        jobs = [job for job in view.jobs if self.draw.random() < 0.8] or list(view.jobs)
        self.draw.shuffle(jobs)
        jobs = jobs[:8]
        sizes = {
            job: float(self.draw.randint(1, int(job.size)))
            for job in jobs
            if job.stage.phase != "decode" and self.draw.random() < self.part
        }
        return Decision(jobs, sizes=sizes)


@pytest.mark.parametrize(("overrides", "other"), VARIANTS)
def test_neither_do_subsets_nor_chance(tmp_path, overrides, other):
    tiny = chat(tmp_path, [*overrides, "workload.requests=5"], **other)
    best = 0.0
    for count, rule in itertools.product(range(1, 6), ("edf", "priced", "sarathi")):
        for some in itertools.combinations(tiny.requests, count):
            best = max(best, weight_on_time(simulate(replace(tiny, requests=some), rule)))
    for seed in range(40):
        keep = random.Random(seed).sample(list(tiny.requests), 1 + seed % 5)
        some = sorted(keep, key=lambda request: request.arrival)
        best = max(best, weight_on_time(simulate(replace(tiny, requests=some), Chance(seed, seed % 3 / 3))))
    assert 0 < best <= bound_of(tiny, 3).value + 1e-6


def test_a_burst_is_bounded_by_its_prompts(tmp_path):
    burst = chat(tmp_path, ["workload.rate=1000", "workload.requests=30"])
    most = bound_of(burst, 6)
    assert weight_on_time(simulate(burst, "priced")) <= most.value < 20
    assert "windows" in most.method or "starts" in most.method
    assert sum(most.shares.values()) == pytest.approx(most.relaxed, abs=1e-3)


def test_long_generations_are_bounded_by_time(tmp_path):
    long = ["workload.requests=50", "workload.rate=100", "workload.output=30", "slo={total_s: 2}"]
    busy = chat(tmp_path, long)
    most = bound_of(busy, 15)
    assert weight_on_time(simulate(busy, "priced")) <= most.value < 50
    assert most.method.endswith("time 1")


def test_where_all_can_be_served_the_bound_is_all(tmp_path):
    easy = chat(tmp_path, ["workload.rate=0.1", "workload.cv=1"])
    assert bound_of(easy, 6).value == weight_on_time(simulate(easy, "priced")) == 12.0


def test_requests_without_a_promise_count_and_hopeless_ones_do_not(tmp_path):
    classes = "slo={classes: [{total_s: 0.001}, {scale: 1000000}]}"
    mixed = chat(tmp_path, [classes])
    hopeless = [request for request in mixed.requests if request.slo.total < 1]
    assert bound_of(mixed, 6).value == 12 - len(hopeless) < 12
    free = [replace(request, slo=replace(request.slo, total=np.inf)) for request in mixed.requests]
    assert bound_of(replace(mixed, requests=free)).value == 12.0


def test_with_no_time_the_bound_is_what_is_known(tmp_path):
    busy = chat(tmp_path, ["workload.rate=1000", "workload.requests=40"])
    assert bound_of(busy, 3).value < bound_of(busy, 1e-9).value <= 40


def test_a_request_larger_than_the_memory_is_not_served(tmp_path):
    small = chat(tmp_path, ["llm.memory={tokens: 32}", "workload.prompt=20", "workload.output=30", "slo.step_scale=9"])
    assert bound_of(small).value == 0


def test_what_has_no_bound(tmp_path):
    noisy = chat(tmp_path, ["simulation.latency_noise=0.1"])
    with pytest.raises(ConfigError, match="no bound under"):
        bound_of(noisy)
    pool = Pool("gpu", ("llm.prefill", "llm.decode"))
    with pytest.raises(ProfileError, match="a LearntSteps says too little of itself"):
        token_bound(noisy.requests, noisy.lengths, LearntSteps(), pool)
    odd = StepProfile("odd", PrefillTable("p", [1], [0.1], (0, 0, 0)), PrefillTable("d", [1], [0.1], (0, 0, 0)))
    with pytest.raises(ProfileError, match="no bound for decodes of a PrefillTable"):
        token_bound(noisy.requests, noisy.lengths, odd, pool)


def test_only_language_models():
    linear = LinearProfile("d", base=0.1, max_batch=9)
    steps = StepProfile("s", PrefillTable("p", [1], [0.1], (0, 0, 0)), linear)
    with pytest.raises(GraphError, match="not a language model's"):
        token_bound([request("a", one_stage())], {"a": 1}, steps, Pool("gpu", ("s",)))


def drawn_steps(draw):
    """A profile of any shape, not monotone."""
    tokens = sorted(draw.sample(range(1, 400), 6))
    fit = (0.01, draw.uniform(0, 4e-4), draw.choice([0, 1e-7, -1e-7]))
    prefill = PrefillTable("p", tokens, [0.02 + draw.uniform(0.8, 1.2) * 3e-4 * t for t in tokens], fit)
    decode = DecodeGrid(
        "d",
        [1, 3, 9],
        [draw.randint(1, 20), 100],
        [[draw.uniform(0.02, 0.03) for _ in range(2)] for _ in range(3)],
        (0.02, draw.uniform(-1e-4, 1e-3), draw.uniform(-1e-6, 1e-5)),
    )
    line = LinearProfile("d", base=0.02, per_job=draw.choice([0, 1e-4]), per_size=2e-6, max_batch=99)
    mixed, apart = draw.choice([0.6, 1.0, 1.3]), draw.random() < 0.3
    return StepProfile("s", prefill, decode if draw.random() < 0.6 else line, mixed=mixed, sequential=apart)


def test_no_step_takes_less_than_is_claimed():
    draw = random.Random(0)
    for _ in range(60):
        steps = drawn_steps(draw)
        context, batch = 150, 12
        costs = costs_of(steps, context, Limits(batch, memory=None))
        for _ in range(150):
            prompts = [(draw.randint(0, 70), draw.randint(1, 80)) for _ in range(draw.randint(0, 12))]
            decodes = [draw.randint(1, context) for _ in range(draw.randint(0 if prompts else 1, batch))]
            tokens, read = sum(new for _, new in prompts), sum(decodes)
            square = sum((2 * past + new) * new for past, new in prompts)
            seconds = steps.seconds(Step(len(prompts), tokens, square, len(decodes), read)) + 1e-9
            assert seconds >= costs.least[tokens]
            assert seconds >= costs.base
            other = costs.decodes
            if decodes:
                assert seconds >= other.start + other.job * len(decodes) + other.read * read
            for line in costs.prompts if prompts else ():
                assert seconds >= line.start + line.token * tokens + line.job * len(decodes) + line.read * read


def test_texts_have_a_hindsight_too(tmp_path):
    busy = chat(tmp_path, ["workload.rate=30"])
    best = hindsight(busy, 0.5)
    values = {name: weight_on_time(simulate(busy, name)) for name in TEXT_STARTS}
    assert 0 < max(values.values()) <= best.value <= bound_of(busy, 3).value
    assert best.tried > 2 * len(TEXT_STARTS)


def test_hindsight_knows_how_long_texts_get(tmp_path):
    sets = ["workload.max_tokens=3000", "slo={total_s: 0.5}", "workload.rate=8", "workload.seed=8", "llm.memory=null"]
    early = chat(tmp_path, sets)
    plain = weight_on_time(simulate(early, "priced"))
    assert hindsight(early, 0.5, policies=["priced"]).value > plain, "it has seen no lengths, and they may be 3,000"
