"""Placements: their parts against brute force, the whole against all placements, simulated."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from toys import command, squash

from neustream import ConfigError, TableProfile
from neustream.cluster.fleet import Fleet, Instance
from neustream.cluster.planning import Charges, Device, Needs, Placement, Settings, plan
from neustream.cluster.planning import capacity as capacities
from neustream.cluster.planning.capacity import capacity, placements, replicas
from neustream.cluster.planning.charges import charged
from neustream.cluster.planning.cuts import cheapest_cut, cuts, segments
from neustream.cluster.planning.replanner import Replanner
from neustream.cluster.planning.simplex import solve
from neustream.cluster.rules.replan import Replan
from neustream.config import load_config
from neustream.core.demand import Calls
from neustream.core.outlook import Asked, Outlook
from neustream.core.rates import Rates
from neustream.experiment.placements import ground_of, last_of, plan_for
from neustream.experiment.prepared import prepare
from neustream.experiment.running import simulate

STAGES = ("encode", "denoise", "decode")


def device(name: str, count: int, seconds: dict[str, float], **options) -> Device:
    return Device(name, count, Rates({stage: flat(stage, each) for stage, each in seconds.items()}), **options)


def flat(stage: str, seconds: float) -> TableProfile:
    return TableProfile(stage, [1], [seconds])


def charges_of(*devices: Device, rate: float = 1.0, needs: Needs | None = None) -> Charges:
    stages = tuple(devices[0].rates.profiles)
    asked = [Asked(str(n), {stage: Calls(1, False, 1) for stage in stages}) for n in range(10)]
    return Charges(asked, 10 / rate, stages, devices, needs or Needs())


seconds = st.floats(0.01, 2.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_small_programs_are_solved_as_a_library_solves_them(data):
    rows, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    worth, right = random.uniform(-1, 2, width), random.uniform(0, 3, rows) * (random.random(rows) < 0.8)
    table = random.uniform(-0.3, 1, (rows, width))
    table = np.vstack([table, np.ones(width)])
    right = np.append(right, 10.0)
    x = solve(worth, table, right)
    assert (x >= 0).all() and (table @ x <= right + 1e-7).all()
    assert worth @ x == pytest.approx(-linprog(-worth, A_ub=table, b_ub=right).fun, abs=1e-7)


def test_a_program_without_a_largest_is_told():
    with pytest.raises(ValueError, match="no largest"):
        solve(np.array([1.0]), np.array([[-1.0]]), np.array([1.0]))


@settings(max_examples=40, deadline=None)
@given(st.lists(seconds, min_size=3, max_size=4), st.integers(2, 6), st.integers(2, 3))
def test_the_cheapest_cut_is_the_least_of_all(costs, count, groups):
    one = charges_of(device("a", count, {str(n): each for n, each in enumerate(costs)}))
    found = cheapest_cut(one, groups)
    least = math.inf
    for places in itertools.combinations(range(1, len(costs)), groups - 1):
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise((0, *places, len(costs)))]
        for shares in itertools.product(range(1, count + 1), repeat=groups):
            if sum(shares) <= count:
                least = min(least, max(s / n for s, n in zip(sums, shares, strict=True)))
    if least == math.inf:
        assert found == ()
        return
    sums = [sum(costs[int(stage)] for stage in role) for role in found]
    mine = [
        max(s / n for s, n in zip(sums, shares, strict=True))
        for shares in itertools.product(range(1, count + 1), repeat=groups)
        if sum(shares) <= count
    ]
    assert min(mine) == pytest.approx(least)


@settings(max_examples=40, deadline=None)
@given(st.lists(seconds, min_size=6, max_size=6), st.integers(0, 3), st.integers(1, 3))
def test_devices_go_to_the_roles_so_that_the_least_capacity_is_the_largest(costs, fast, slow):
    one = device("a", fast, dict(zip(STAGES, costs[:3], strict=True)))
    other = device("b", slow, dict(zip(STAGES, costs[3:], strict=True)))
    charges = charges_of(one, other)
    for cut in [(STAGES,), (STAGES[:1], STAGES[1:]), (STAGES[:2], STAGES[2:])]:
        found = replicas(charges, cut)
        every = placements(charges, cut)
        if not every:
            assert found is None
            continue
        assert found is not None
        best = max(capacity(charges, placement) for placement in every)
        assert capacity(charges, found) >= 0.999 * best


@pytest.mark.parametrize("count", [7, 40, 400])
def test_many_devices_are_shared_out_nearly_as_a_linear_program_would(monkeypatch, count):
    monkeypatch.setattr(capacities, "FEW", 0)
    one = device("a", count, {"encode": 0.05, "denoise": 0.9, "decode": 0.11})
    charges = charges_of(one, device("b", count // 3, {"encode": 0.05, "denoise": 2.0, "decode": 0.12}))
    found = replicas(charges, (STAGES[:1], STAGES[1:2], STAGES[2:]))
    assert found is not None and sum(n for _, _, n in found.counts) == count + count // 3
    most = capacity(charges, Placement.of({("a", STAGES): count, ("b", STAGES): count // 3}))
    assert capacity(charges, found) >= most * (1 - 3 / count)


def test_capacity_counts_what_all_devices_can_do_together():
    charges = charges_of(device("a", 3, {"encode": 0.1, "denoise": 0.8, "decode": 0.1}))
    assert capacity(charges, Placement.of({("a", STAGES): 3})) == pytest.approx(3.0)
    split = Placement.of({("a", ("denoise",)): 2, ("a", ("encode", "decode")): 1})
    assert capacity(charges, split) == pytest.approx(2.5)
    mixed = Placement.of({("a", ("denoise",)): 2, ("a", STAGES): 1})
    assert capacity(charges, mixed) == pytest.approx(1.0), "who begins with all stays to the end"
    assert capacity(charges, Placement.of({("a", ("denoise",)): 3})) == 0.0


def test_handovers_and_memory_and_ties_count():
    needs = Needs({"denoise": 5e9}, state_bytes=1e6, bandwidth=1e8)
    small = device("a", 2, dict.fromkeys(STAGES, 0.1), memory_bytes=4e9)
    large = device("b", 1, dict.fromkeys(STAGES, 0.1), memory_bytes=6e9)
    charges = charges_of(small, large, needs=needs)
    assert charges.fits(STAGES) == ["b"] and charges.fits(("decode",)) == ["a", "b"]
    assert charges.of_run("a", ("decode",)) == pytest.approx(0.11)
    assert charges.total("a", ("encode", "decode")) == pytest.approx(0.22)
    assert charges.total("b", ("denoise",)) == pytest.approx(0.12), "state comes in and goes out"
    tied = charges_of(device("a", 2, {"chat.prefill": 0.1, "chat.decode": 0.1}), needs=Needs(tied=frozenset({"chat"})))
    assert tied.fits(("chat.prefill",)) == [] and replicas(tied, (("chat.prefill",), ("chat.decode",))) is None


def test_charges_are_of_the_batches_that_slack_allows():
    rates = Rates({"unet": TableProfile("unet", [1, 2, 4], [1.0, 1.2, 2.0])})
    calls = {"unet": Calls(10, True, 4)}
    assert charged(Asked("r", calls, due_in=math.inf), rates, Needs()) == {"unet": 5.0}
    assert charged(Asked("r", calls, due_in=13.0), rates, Needs()) == {"unet": 6.0}
    assert charged(Asked("r", calls, due_in=10.5), rates, Needs()) == {"unet": 10.0}
    assert charged(Asked("r", {**calls, "vae": Calls(1, False, 1)}), rates, Needs())["vae"] == math.inf


def test_texts_are_charged_by_the_batches_that_memory_and_pace_allow():
    decode = TableProfile("llm.decode", [1, 8], [0.1, 0.24])
    rates = Rates({"llm.decode": decode})
    asked = Asked("r", {"llm.decode": Calls(10, True, 8, 100.0)}, tokens=100.0)
    assert charged(asked, rates, Needs())["llm.decode"] == pytest.approx(0.3)
    two = charged(asked, rates, Needs(rooms={"llm": 220.0}))["llm.decode"]
    assert two == pytest.approx(10 * 0.12 / 2)
    slow = Asked("r", asked.calls, tokens=100.0, step=0.11)
    assert charged(slow, rates, Needs())["llm.decode"] == pytest.approx(1.0)


def test_cuts_of_several_models_have_each_apart():
    charges = charges_of(device("a", 4, dict.fromkeys(("sd.unet", "sd.vae", "chat.prefill"), 0.1)))
    assert cuts(charges)[("sd.unet", "sd.vae"), ("chat.prefill",)] in ("each model apart", "least charge in 2 groups")
    assert len(segments(STAGES)) == 6 and segments(STAGES)[0] == STAGES


def test_one_of_several_models_is_tried_alone_beside_all_of_them():
    stages = ("sd.unet", "sd.vae", "chat.prefill", "chat.decode")
    charges = charges_of(device("a", 3, dict.fromkeys(stages, 0.1)), rate=100.0)
    wanted = Placement.of({("a", stages): 1, ("a", stages[:2]): 2})
    found = plan(charges, lambda placement: 2.0 if placement == wanted else 1.0, None, Settings(most=99, tries=0))
    assert found.placement == wanted and found.best.about == "one model alone on some"


def test_a_change_has_to_gain_more_than_it_costs():
    charges = charges_of(device("a", 2, dict.fromkeys(STAGES, 0.1), load_s=30.0), rate=10.0)
    whole = Placement.of({("a", STAGES): 2})
    present = Placement.of({("a", STAGES[:2]): 1, ("a", STAGES[2:]): 1})
    goodput = {whole: 9.0, present: 8.8}

    def judge(placement: Placement) -> float:
        return goodput.get(placement, 1.0)

    kept = plan(charges, judge, present, Settings(tries=0))
    assert kept.placement == present and kept.why.startswith("stays as it is")
    goodput[present] = 8.0  # 35 of 300 s of both devices: 9 counts as 7.95
    assert plan(charges, judge, present, Settings(tries=0)).placement == present
    moved = plan(charges, judge, present, Settings(tries=0, plan_s=3000.0))
    assert moved.placement == whole and "as it is, 8" in moved.why
    assert plan(charges, judge, None, Settings(tries=0)).placement == whole


def test_devices_change_their_roles_while_that_serves_more():
    charges = charges_of(device("a", 3, dict.fromkeys(STAGES, 0.1)), rate=100.0)
    wanted = Placement.of({("a", STAGES): 1, ("a", STAGES[1:]): 1, ("a", STAGES[:1]): 1})

    def judge(placement: Placement) -> float:
        return 1.0 + len(set(placement.counts) & set(wanted.counts))

    found = plan(charges, judge)
    assert found.placement == wanted and found.best.about == "one device changed"


def test_what_fits_nowhere_is_told():
    charges = charges_of(device("a", 2, dict.fromkeys(STAGES, 0.1), memory_bytes=1.0), needs=Needs({"decode": 2.0}))
    with pytest.raises(ConfigError, match="no placement of stages encode, denoise, decode on 2 devices"):
        plan(charges, lambda placement: 1.0)
    with pytest.raises(ConfigError, match="no requests to plan for"):
        Charges([], 1.0, STAGES, [], Needs())
    with pytest.raises(ConfigError, match="gain must be 0 or more, got -1"):
        Settings(gain=-1)


CONFIG = """
name: fleet
profiles: {root}/profiles/rtx4090/sd15_512
stages: {{clip: {{max_batch: 10}}, unet: {{times: steps, max_batch: 15}}, vae: {{profile: [vae, safety]}}}}
workload: {{rate: 20, cv: 2, requests: 40, steps: {{min: 5, max: 10}}}}
slo: {{scale: 2.5}}
policies: {{edf: {{}}}}
cluster: {{instances: 2}}
"""


@pytest.fixture
def config(tmp_path, root):
    path = tmp_path / "fleet.yaml"
    path.write_text(CONFIG.format(root=root))
    return path


@pytest.mark.parametrize("policy", ["edf", "priced"])
def test_the_plan_is_nearly_as_good_as_the_best_of_all_placements(config, policy):
    prepared = prepare(load_config(config, ["cluster.network.state_bytes=1e6"]))
    ground = ground_of(prepared, prepared.experiment.cluster)

    def serve(some, cluster):
        return simulate(some, policy, cluster=cluster)

    found, charges = plan_for(ground, prepared.requests, serve, Settings(tries=8))
    every = placements(charges, segments(charges.stages))
    assert len(every) == 9
    reports = [serve(prepared, ground.with_placement(placement)) for placement in every]
    best = max(report.counts["on_time"] for report in reports)
    chosen = serve(prepared, ground.with_placement(found.placement)).counts["on_time"]
    assert chosen >= 0.98 * best and best < 40, "some requests are late, so that placements differ"


def test_the_command_says_what_to_put_where_and_why(config, tmp_path):
    out, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    split = "cluster.instances={a: {count: 1, stages: [clip, unet]}, b: {count: 1, stages: [vae]}}"
    words = ["--set", split, "--last", "1", "--tries", "0", "--json", str(out), "--figure", str(figure)]
    done = command("plan", str(config), *words)
    assert done.status == 0, done.out + done.err
    told = json.loads(out.read_text())
    assert told["placement"] == {"4090": {"device": "4090", "count": 2, "stages": ["clip", "unet", "vae"]}}
    assert {"all together", "as it is"} <= {one["about"] for one in told["candidates"]}
    assert set(told["charges_s"]) == {"4090"} and told["goodput_rps"] <= told["rate_rps"]
    assert squash("> 2 4090: clip + unet + vae") in squash(done.out) and figure.stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cluster=null", "a placement needs a cluster's devices"),
        ("cluster.weights_bytes={unett: 1}", "cluster.weights_bytes: no stage 'unett'; did you mean 'unet'?"),
        ("workload.requests=1", "1 requests are too few"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_line(config, change, message):
    done = command("plan", str(config), "--set", change)
    assert done.status == 2 and squash(message) in squash(done.out + done.err)


def test_a_placement_is_of_the_last_arrivals(config):
    requests = prepare(load_config(config)).requests
    late = last_of(requests, 0.5)
    assert 0 < len(late) < 40 and late[0].arrival >= 0 and late[-1].arrival == pytest.approx(0.5)
    assert [one.id for one in late] == [one.id for one in requests[-len(late) :]]


# -- planned anew -----------------------------------------------------------------------------------

WHOLE, FRONT, BACK = STAGES, STAGES[:1], STAGES[1:]
NAMES = {("a", WHOLE): "a", ("a", FRONT): "a.front", ("a", BACK): "a.back"}


class Cluster:
    """A fleet that does at once what a scaler says, but for drains, which take a while."""

    def __init__(self, counts: dict[str, int], device: Device) -> None:
        self.fleet = Fleet(dict.fromkeys(NAMES.values(), device.rates))
        self.made = 0
        self.tick(counts)

    def tick(self, target: dict[str, int]) -> None:
        """Those who drained are gone; then as many are started and drained as it takes."""
        for one in [each for each in self.fleet.instances.values() if each.state == "draining"]:
            self.fleet.remove(one)
        for role, count in target.items():
            up = [one for one in self.fleet.instances.values() if one.role == role]
            for _ in range(count - len(up)):
                self.made += 1
                name = f"{role}-{self.made}"
                stages = frozenset(next(stages for (_, stages), each in NAMES.items() if each == role))
                self.fleet.add(Instance(name, 0, role, role, stages, Outlook(name), 0.0, 0.0))
            for one in up[: max(len(up) - count, 0)]:
                one.state = "draining"

    @property
    def roles(self) -> list[str]:
        return sorted(f"{one.role} {one.state}" for one in self.fleet.instances.values())

    def ask(self, scaler: Replanner, now: float, rate: float) -> None:
        """Ask at an instant, after so many requests a second."""
        calls = {stage: Calls(1, False, 1) for stage in STAGES}
        self.fleet.now = now
        self.fleet.arrivals.clear()
        for n in range(int(20 * rate)):
            self.fleet.arrivals.append((now - 20 + n / rate, Asked(str(n), calls, "encode")))
        self.tick(scaler.target(self.fleet))


def replanner(plans: list[Placement], present: Placement, **rule) -> tuple[Replanner, list[int]]:
    asked: list[int] = []

    def planned(arrivals, now) -> Placement:
        asked.append(len(arrivals))
        return plans.pop(0)

    one = device("a", 3, dict.fromkeys(STAGES, 0.1))
    return Replanner(Replan(window_s=20, plan_s=100, **rule), NAMES, [one], present, planned), asked


def test_devices_get_from_one_placement_to_the_next_one_at_a_time():
    whole = Placement.of({("a", WHOLE): 3})
    split = Placement.of({("a", FRONT): 1, ("a", BACK): 2})
    scaler, asked = replanner([split], whole)
    cluster = Cluster({"a": 3}, device("a", 3, dict.fromkeys(STAGES, 0.1)))
    seen = []
    for second in range(19, 32):
        cluster.ask(scaler, float(second), 2.0)
        seen.append(cluster.roles)
        assert len(cluster.fleet.instances) <= 3, "no device serves twice"
    assert asked == [40] and seen[0] == ["a up"] * 3 and seen[1] == ["a draining", "a up", "a up"]
    assert cluster.roles == ["a.back up", "a.back up", "a.front up"]
    changes = sum(before != after for before, after in itertools.pairwise(seen))
    assert changes == 9, "three times: one drains, it is gone, another one starts"


def test_it_is_planned_anew_in_time_or_when_the_demand_has_changed():
    whole = Placement.of({("a", WHOLE): 3})
    scaler, asked = replanner([whole] * 9, whole)
    cluster = Cluster({"a": 3}, device("a", 3, dict.fromkeys(STAGES, 0.1)))
    for now, rate, plans in [
        (10.0, 2.0, 0),  # too early
        (20.0, 0.5, 0),  # too few to tell
        (21.0, 2.0, 1),
        (60.0, 2.2, 1),  # within the range
        (61.0, 2.6, 2),
        (70.0, 9.0, 2),  # within a window of the last one
        (82.0, 9.0, 3),
        (170.0, 9.0, 3),
        (182.0, 9.0, 4),  # in any case after plan_s
    ]:
        cluster.ask(scaler, now, rate)
        assert len(asked) == plans, now


def test_a_cluster_goes_from_a_bad_placement_to_a_better_one(config):
    split = "cluster.instances={front: {count: 1, stages: [clip, vae]}, core: {count: 2, stages: [unet]}}"
    load = ["workload.requests=120", "workload.rate=15", "workload.cv=1"]
    plans = "cluster.scaler={plan: {plan_s: 60, window_s: 4, tries: 0, most: 2, drain_s: 0}}"
    report = simulate(prepare(load_config(config, [split, *load, plans])), "priced")
    seen = [(role, count) for _, role, count in report.scaled]
    assert seen[:2] == [("4090.unet", 1), ("4090", 1)] and ("4090", 2) in seen
    assert report.counts["failed"] == 0 and sum(report.counts.values()) == 120
