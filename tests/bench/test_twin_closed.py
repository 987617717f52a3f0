"""Closed loops and bounds on concurrency without HTTP: simulated, and served in this process."""

from __future__ import annotations

from itertools import pairwise

import pytest
from toys import command, toy

from neustream.bench import read_runs
from neustream.bench.plan import Plan
from neustream.commands.bench_twin import TwinOptions, play_here
from neustream.errors import ConfigError
from neustream.workload.asks import Ask, ImageAsk, Limits

pytestmark = pytest.mark.usefixtures("unhurried")
HOW = pytest.mark.parametrize("real", [False, True])


@pytest.fixture
def config(tmp_path):
    toy(tmp_path)
    return tmp_path / "toy.yaml"


def asks(number, arrival=None, **named):
    image, limits = ImageAsk(steps=3), Limits(e2e_s=30.0)
    return [Ask(str(at), arrival, image=image, limits=limits, **named) for at in range(number)]


def most_at_once(records):
    """By when they were sent and over."""
    events = [(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records]
    under_way = most = 0
    for _, step in sorted(events):
        under_way += step
        most = max(most, under_way)
    return most


@HOW
@pytest.mark.parametrize("places", [1, 3])
def test_a_closed_loop_has_so_many_under_way(config, real, places):
    run = play_here(Plan(asks(10), "closed", concurrency=places), TwinOptions(config, real=real))
    assert [record.outcome for record in run.records] == ["done"] * 10
    assert [record.id for record in run.records] == [str(at) for at in range(10)]
    assert most_at_once(run.records) == places
    assert all(record.scheduled_s == record.sent_s and record.waited_s == 0.0 for record in run.records)


@HOW
def test_without_a_schedule_and_a_bound_all_come_at_once(config, real):
    run = play_here(Plan(asks(6), "burst"), TwinOptions(config, real=real))
    assert all(record.done for record in run.records) and most_at_once(run.records) == 6


@HOW
def test_a_bound_makes_scheduled_requests_late(config, real):
    run = play_here(Plan(asks(5, 0.0), "bounded", concurrency=1), TwinOptions(config, real=real))
    assert [record.scheduled_s for record in run.records] == [0.0] * 5
    assert most_at_once(run.records) == 1 and all(record.lag_s == 0.0 for record in run.records)
    for before, after in pairwise(run.records):
        assert after.waited_s == pytest.approx(after.sent_s) and after.sent_s >= before.end_s
        assert after.e2e_s() > after.waited_s


@HOW
def test_turns_go_before_conversations_that_have_not_begun(config, real):
    image, limits = ImageAsk(steps=3), Limits(e2e_s=30.0)
    plan = [Ask(str(at), image=image, limits=limits, session=str(at)) for at in range(6)]
    plan.insert(1, Ask("0b", image=image, limits=limits, session="0", follows="0"))
    run = play_here(Plan(plan, "talks", concurrency=2), TwinOptions(config, real=real))
    of = {record.id: record for record in run.records}
    assert all(record.done for record in of.values()) and most_at_once(run.records) <= 2
    assert of["0b"].sent_s >= of["0"].end_s and of["5"].sent_s >= of["0b"].sent_s


@HOW
def test_a_request_that_is_dropped_leaves_its_place(config, real):
    image = ImageAsk(steps=3)
    plan = [Ask(str(at), image=image, limits=Limits(e2e_s=1e-6 if at == 1 else 30.0)) for at in range(4)]
    run = play_here(Plan(plan, "closed", concurrency=1), TwinOptions(config, policy="fcfs", real=real))
    assert [record.outcome for record in run.records] == ["done", "dropped", "done", "done"]


def test_places_are_kept_on_the_instances_of_a_cluster(config):
    run = play_here(Plan(asks(10), "closed", concurrency=3), TwinOptions(config, set_=["cluster.instances=2"]))
    assert all(record.done for record in run.records) and most_at_once(run.records) == 3


def test_the_command_takes_a_bound(config, tmp_path):
    told = ["bench", "serve", "--backend", "neustream", "--config", config, "--dataset-name", "images"]
    more = ["--image-steps", "3", "--num-prompts", "8", "--max-concurrency", "2", "--goodput", "e2el:30000"]
    done = command(*told, *more, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    ((run,), _) = read_runs(tmp_path / "out")
    assert len(run.records) == 8 and most_at_once(run.records) == 2 and run.plan["concurrency"] == 2


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(asks(2), "p", duration_s=3.0), "plan 'p': duration_s is 3; all requests are played here"),
        (Plan(asks(2), "p", concurrency=0), "plan 'p': concurrency is 0; expected at least 1"),
        (
            Plan([*asks(1, 0.5), Ask("x", image=ImageAsk(steps=3))], "p"),
            "plan 'p': 'x' has no arrival; expected one of all, or of none",
        ),
    ],
)
def test_what_cannot_be_played_is_named(config, plan, says):
    with pytest.raises(ConfigError, match=says):
        play_here(plan, TwinOptions(config))
