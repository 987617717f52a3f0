"""Small graphs, profiles, stream modules, configs and a way to call the command, for several test files."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import yaml

from neustream import (
    FCFS,
    SLO,
    Decision,
    Engine,
    Graph,
    Member,
    Pool,
    Priced,
    ProfiledExecutor,
    Request,
    Scheduler,
    Stage,
    TableProfile,
    ThreadExecutor,
    VirtualClock,
    WallClock,
    loop,
    seq,
)

TESTS = Path(__file__).parent
OUTCOMES = ("on_time", "late", "dropped", "failed", "cancelled")

# -- graphs, profiles, engines ----------------------------------------------------------------------


def table(name, *seconds, device="toy device"):
    """A profile of batch 1, 2, ..."""
    return TableProfile(name, range(1, len(seconds) + 1), seconds, device=device)


def one_stage(max_batch=1):
    """A graph of one step: the stage "s"."""
    return Graph("one", Stage("s", max_batch=max_batch, emits=True))


def draw_and_decode(max_batch=2, decode_batch=1):
    """A loop of `steps` draws, then a decode."""
    draw, decode = Stage("draw", max_batch=max_batch), Stage("decode", max_batch=decode_batch, emits=True)
    return Graph("toy", seq(loop(draw, times=lambda job: job.params["steps"]), decode))


def engine(graph, profiles, policy=None, *, workers=1, executor=None, clock=None, observers=(), sticky=False):
    """An engine on one pool named "gpu"; in virtual time by the profiles unless told otherwise."""
    scheduler = Scheduler([Pool("gpu", tuple(graph.stages), workers, sticky)], policy or FCFS(), profiles)
    return Engine(Member(scheduler, {"gpu": executor or ProfiledExecutor()}), clock or VirtualClock(), observers)


def live(graph, modules, profiles, policy=None, observers=()):
    """An engine that runs real modules on a thread; not started."""
    rule = policy or Priced()
    return engine(graph, profiles, rule, executor=ThreadExecutor(modules), clock=WallClock(), observers=observers)


class Flat:
    """A step profile for tests that are not about time: every step takes a millisecond."""

    name, device, learns, error = "llm", "here", False, 0.0

    def seconds(self, step):
        return 1e-3

    def profiled(self, step):
        return 1e-3

    def observe(self, step, seconds):
        pass


def policy_in(scheduler):
    """The policy of its pools; the same for all."""
    (policy,) = {id(policy): policy for policy in scheduler.policies.values()}.values()
    return policy


def request(id, graph, arrival=0.0, steps=1, total=1000.0, **slo):
    return Request(id, graph, arrival, SLO(total, **slo), {"steps": steps})


def ends(log):
    """id -> when it ended, of an EventLog."""
    return {id: entry["end"] for id, entry in log.requests.items()}


def batches(log):
    """The (stage, jobs) of each step of an EventLog, in order."""
    return [(step["stage"], step["jobs"]) for step in log.steps]


def adds_up(counts):
    """Whether each submitted request has exactly one outcome."""
    return counts["submitted"] == sum(counts[outcome] for outcome in OUTCOMES)


# -- stream modules ---------------------------------------------------------------------------------


class Step:
    """A stream module that applies a function to each input, and remembers where it was loaded."""

    def __init__(self, function=lambda one: {"out": one.id}):
        self.function = function
        self.loaded = []
        self.sizes = []

    def load(self, device):
        assert not self.sizes, "loaded after the first step"
        self.loaded.append(device)

    def step(self, inputs):
        self.sizes.append(len(inputs))
        return [self.function(one) for one in inputs]


class Gate(Step):
    """A stream module whose steps begin (`began`) and then wait until `go` is set."""

    def __init__(self):
        super().__init__()
        self.began = threading.Event()
        self.go = threading.Event()

    def step(self, inputs):
        self.began.set()
        assert self.go.wait(30)
        return super().step(inputs)


# -- policies that configs name ---------------------------------------------------------------------


@dataclass(frozen=True)
class Newest:
    """Last come, first served."""

    max_batch: int = 1

    def decide(self, view):
        jobs = sorted(view.jobs, key=lambda job: -job.arrival)
        alike = [job for job in jobs if job.stage is jobs[0].stage]
        return Decision(alike[: min(self.max_batch, view.limit(jobs[0].stage.name))])


class Plain:
    """A policy that is no dataclass and takes nothing."""

    def decide(self, view):
        return Decision([view.jobs[0]])


# -- configs and the command ------------------------------------------------------------------------


def write_profile(path, stage, batch, latency_s, **other):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = {"format": "neustream.profile/1", "kind": "table", "stage": stage, "device": "toy device", "origin": {}}
    path.write_text(json.dumps({**file, "batch": batch, "latency_s": latency_s, **other}))
    return path


def toy(folder, **sections):
    """Write `toy.yaml` and its profiles to `folder`; `sections` replace those of the default."""
    write_profile(folder / "profiles/draw.json", "draw", [1, 2, 4], [0.002, 0.0025, 0.003])
    write_profile(folder / "profiles/decode.json", "decode", [1, 2], [0.001, 0.0015])
    raw = {
        "name": "toy",
        "profiles": "profiles",
        "stages": {"draw": {"times": "steps", "max_batch": 4}, "decode": {"max_batch": 2}},
        "workload": {"arrivals": "gamma", "rate": 200, "requests": 10, "steps": {"min": 1, "max": 4}},
        "slo": {"total_s": 30},
        "policies": {"fcfs": {}},
        "backend": {"kind": "toy_backend:make"},
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**raw, **sections}, sort_keys=False))
    return path


@dataclass
class Called:
    status: int
    out: str
    err: str


def command(*args):
    """Call `neustream ARGS` in this process."""
    from neustream.cli import main

    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = ["neustream", *map(str, args)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as done:
            status = done.code or 0
    gc.unfreeze()  # `run` froze what it found
    return Called(status, out.getvalue(), err.getvalue())


def results(path):
    """The content of a JSON file, which has neither NaN nor infinities."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def squash(text):
    """`text` without white space: messages are wrapped to the terminal's width."""
    return "".join(text.split())
