"""The same workload without HTTP: simulated, and served in this process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml
from toys import command, toy

from neustream.bench import read_runs
from neustream.bench.plan import Plan
from neustream.bench.reports.building import reports
from neustream.commands.bench_twin import TwinOptions, play_here
from neustream.errors import ConfigError
from neustream.workload.asks import Ask, ImageAsk, Limits

pytestmark = pytest.mark.usefixtures("unhurried")
IMAGES = ["--dataset-name", "images", "--image-steps", "2,4", "--num-prompts", "12"]
SERVE = ["bench", "serve", "--backend", "neustream"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    toy(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_images_are_simulated_under_the_plan_that_a_server_would_get(here):
    more = ["--config", "toy.yaml", "--request-rate", "100", "--goodput", "e2el:40", "--out", "sim"]
    done = command(*SERVE, *IMAGES, *more)
    assert done.status == 0, done.err
    ((run,), _) = read_runs(here / "sim")
    assert len(run.records) == 12 and all(record.images == 1 for record in run.records)
    for record in run.records:
        assert record.sent_s == pytest.approx(record.scheduled_s)
        assert record.e2e_s() >= 0.002 * record.image["steps"] and record.limits.e2e_s == 0.04
    assert run.target["policy"] == "default" and run.client == {}
    again = command(*SERVE, *IMAGES, *more[:-1], "again")
    assert again.status == 0
    assert read_runs(here / "again")[0][0].records == run.records


def test_images_are_served_for_real_and_compared(here):
    more = ["--config", "toy.yaml", "--request-rate", "50", "--goodput", "e2el:30000"]
    assert command(*SERVE, *IMAGES, *more, "--out", "sim").status == 0
    done = command(*SERVE, *IMAGES, *more, "--real", "--out", "real")
    assert done.status == 0, done.err
    simulated, real = (read_runs(here / name)[0][0] for name in ("sim", "real"))
    assert [record.id for record in real.records] == [record.id for record in simulated.records]
    assert [record.image for record in real.records] == [record.image for record in simulated.records]
    for one, other in zip(real.records, simulated.records, strict=True):
        assert one.scheduled_s == other.scheduled_s and one.sent_s >= one.scheduled_s and one.done
    done = command("bench", "compare", "sim", "real", "--json", "-")
    assert done.status == 0 and set(json.loads(done.out)) == {"sim", "real"}


def test_what_an_experiment_promises_counts_where_nothing_else_is_promised(here):
    done = command(*SERVE, *IMAGES, "--config", "toy.yaml", "--request-rate", "100", "--json", "-")
    told = json.loads(done.out)
    assert told["slo_attainment"]["of"] == 12 and told["offered"] == 12


def test_what_a_policy_gives_up_is_dropped(here):
    more = ["--config", "toy.yaml", "--request-rate", "2000", "--goodput", "e2el:6", "--policy", "fcfs", "--json", "-"]
    told = json.loads(command(*SERVE, *IMAGES, *more).out)
    assert told["failures"]["dropped"] >= 1 and told["completed"] + told["failures"]["dropped"] == 12


def test_texts_are_simulated_token_by_token(here, root):
    config = root / "configs/paper/opt_13b_a6000.yaml"
    more = ["--config", config, "--request-rate", "1", "--num-prompts", "5", "--goodput", "ttft:60000", "tpot:1000"]
    lengths = ["--random-input-len", "100", "--random-output-len", "7"]
    done = command(*SERVE, *lengths, *more, "--out", "sim")
    assert done.status == 0, done.err
    ((run,), _) = read_runs(here / "sim")
    for record in run.records:
        assert (record.input_tokens, record.output_tokens, len(record.token_times_s)) == (100, 7, 7)
        assert record.token_times_s == sorted(record.token_times_s) and record.met()


def follows(records):
    """Pairs of turns: each, and the one before it."""
    of = {record.id: record for record in records}
    return [(record, of[str(int(record.id) - 4)]) for record in records if int(record.id) >= 4]


def test_turns_of_conversations_are_simulated_once_the_ones_before_are_answered(here, root):
    more = ["--config", root / "configs/paper/opt_13b_a6000.yaml", "--request-rate", "50", "--num-prompts", "12"]
    data = ["--dataset-name", "sessions", "--sessions-turns", "3", "--sessions-think", "0.25", "--output-len", "5"]
    lengths = ["--sessions-system-len", "40", "--sessions-question-len", "10", "--goodput", "e2el:60000"]
    done = command(*SERVE, *data, *lengths, *more, "--out", "sim")
    assert done.status == 0, done.err
    ((run,), _) = read_runs(here / "sim")
    assert len(run.records) == 12 and all(record.done for record in run.records)
    for record, before in follows(run.records):
        assert record.session == before.session and record.input_tokens == before.input_tokens + 15
        assert record.sent_s == pytest.approx(before.end_s + 0.25) == pytest.approx(record.scheduled_s)


def conversation(more=()):
    """Four conversations of three images each."""
    asks = [
        Ask(
            str(at),
            0.01 * at,
            prompt="a hill",
            image=ImageAsk(steps=3),
            limits=Limits(e2e_s=30.0),
            session=str(at % 4),
            follows=str(at - 4) if at >= 4 else "",
            think_s=0.03 if at >= 4 else 0.0,
        )
        for at in range(12)
    ]
    return Plan([*asks, *more], "talks")


@pytest.mark.parametrize("real", [False, True])
def test_turns_are_served_as_they_are_simulated(here, real):
    run = play_here(conversation(), TwinOptions(here / "toy.yaml", real=real))
    assert [record.outcome for record in run.records] == ["done"] * 12
    for record, before in follows(run.records):
        own = 0.01 * int(record.id)
        assert record.scheduled_s == pytest.approx(max(own, before.end_s + 0.03))
        assert record.sent_s >= record.scheduled_s - 1e-9


def test_turns_are_simulated_on_the_instances_of_a_cluster(here):
    run = play_here(conversation(), TwinOptions(here / "toy.yaml", set_=["cluster.instances=2"]))
    assert [record.outcome for record in run.records] == ["done"] * 12
    assert all(record.sent_s >= before.end_s + 0.03 - 1e-9 for record, before in follows(run.records))


@pytest.mark.parametrize("real", [False, True])
def test_turns_behind_one_that_came_to_nothing_are_blocked(here, real):
    """The first turn of the fifth conversation cannot be in time, and fcfs gives it up."""
    image, hopeless = ImageAsk(steps=3), Limits(e2e_s=1e-6)
    behind = [
        Ask("12", 0.2, image=image, session="4", limits=hopeless),
        Ask("13", 0.2, image=image, session="4", follows="12"),
        Ask("14", 0.2, image=image, session="4", follows="13"),
    ]
    run = play_here(conversation(behind), TwinOptions(here / "toy.yaml", policy="fcfs", real=real))
    of = {record.id: record for record in run.records}
    assert len(of) == 15 and sum(record.done for record in run.records) == 12
    assert [of[id].outcome for id in ("12", "13", "14")] == ["dropped", "blocked", "blocked"]
    assert of["14"].end_s is of["14"].sent_s is None and "'13'" in of["14"].error


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        ([Ask("x", 0.5, session="9", follows="y")], "'x' follows 'y'; expected a request of a session"),
        ([Ask("x", 0.5, session="9", follows="x")], "'x' follows 'x'; expected a request of a session"),
        ([Ask("x", 0.5), Ask("z", 0.6, follows="x")], "'z' follows 'x'; expected a request of a session"),
        ([Ask("x", 0.5), Ask("x", 0.6)], "'x' is the id of two requests; expected different ones"),
        ([Ask("x", 0.5, session="9", think_s=-1.0)], "'x' has think_s -1.0; expected seconds, at least 0"),
        ([Ask("x", 0.5, session="9", think_s=math.nan)], "'x' has think_s nan; expected seconds, at least 0"),
    ],
)
def test_turns_that_cannot_be_played_are_refused_by_name(here, asks, says):
    images = [replace(ask, image=ImageAsk(steps=3)) for ask in asks]
    with pytest.raises(ConfigError, match=f"plan 'talks': {says}"):
        play_here(conversation(images), TwinOptions(here / "toy.yaml"))


def test_a_plan_without_requests_is_refused(here):
    with pytest.raises(ConfigError, match="plan 'none': no requests; expected at least one"):
        play_here(Plan([], "none"), TwinOptions(here / "toy.yaml"))


@pytest.mark.parametrize("real", [False, True])
def test_a_turn_that_is_due_before_the_one_that_it_follows_comes_after_that(here, real, capsys):
    asks = [
        Ask("a", 0.2, image=ImageAsk(steps=3), session="0"),
        Ask("b", 0.1, image=ImageAsk(steps=3), session="0", follows="a"),
        Ask("c", 0.15, image=ImageAsk(steps=3), session="0", follows="b"),
    ]
    run = play_here(Plan(asks, "talks"), TwinOptions(here / "toy.yaml", real=real))
    assert [(record.id, record.done) for record in run.records] == [("a", True), ("b", True), ("c", True)]
    assert all(after.sent_s >= before.end_s for before, after in pairwise(run.records))
    assert "out of order" not in capsys.readouterr().err


def test_several_models_share_a_device(here, root):
    """Requests go to the model that they name, others to the first of their kind; at the plan's instants."""
    rows = [
        {"arrival_s": 3.0, "prompt_tokens": 10, "output_tokens": 3},
        {"arrival_s": 3.5, "steps": 20, "model": "sd"},
        {"arrival_s": 4.0, "prompt_tokens": 20, "output_tokens": 4, "model": "chat"},
        {"arrival_s": 4.25, "steps": 21},
    ]
    (here / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = root / "configs/demo/sd_and_opt.yaml"
    data = ["--dataset-name", "trace", "--dataset-path", "mixed.jsonl", "--config", config, "--goodput", "e2el:60000"]
    done = command(*SERVE, *data, "--out", "sim")
    assert done.status == 0, done.err
    ((run,), _) = read_runs(here / "sim")
    assert [(each.scheduled_s, each.kind, each.outcome) for each in run.records] == [
        (0.0, "text", "done"), (0.5, "image", "done"), (1.0, "text", "done"), (1.25, "image", "done")
    ]  # fmt: skip
    assert [each.sent_s for each in run.records] == pytest.approx([0.0, 0.5, 1.0, 1.25])
    assert [each.output_tokens for each in run.records if each.kind == "text"] == [3, 4]
    texts = ["--random-input-len", 10, "--random-output-len", 3, "--num-prompts", 4, "--request-rate", 5]
    alone = [*SERVE, *texts, "--config", config, "--goodput", "e2el:60000", "--json", "-"]
    assert json.loads(command(*alone).out)["completed"] == 4
    done = command(*alone, "--model", "cat")
    assert done.status == 2 and "no model 'cat'; did you mean 'chat'" in done.err
    done = command(*alone, "--model", "sd")
    assert done.status == 2 and "its model 'sd' makes images, and texts are asked for" in done.err


def test_several_models_are_served_for_real(here):
    one = yaml.safe_load((here / "toy.yaml").read_text())
    model = {key: value for key, value in one.items() if key not in ("name", "policies")}
    pair = {"name": "pair", "models": dict.fromkeys("abc", model)}
    (here / "pair.yaml").write_text(yaml.safe_dump(pair, sort_keys=False))
    asked = ["--lora-modules", "a", "b", "--lora-assignment", "round-robin"]
    more = ["--config", "pair.yaml", "--request-rate", "100", "--goodput", "e2el:30000", *asked]
    for how in ([], ["--real"]):
        done = command(*SERVE, *IMAGES, *more, *how, "--out", "out")
        assert done.status == 0, done.err
        ((run,), _) = read_runs(here / "out")
        assert [record.model for record in run.records] == ["a", "b"] * 6
        assert all(record.done for record in run.records)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "needs --config"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--config", "toy.yaml", "--policy", "odd"], "odd"),
        (["--config", "toy.yaml", "--set", "x=1"], "x"),
        (["--config", "toy.yaml", "--dataset-name", "random"], "its model makes images, and texts are asked for"),
    ],
)
def test_what_cannot_be_served_here_is_named(here, more, says):
    done = command(*SERVE, *IMAGES, "--request-rate", "10", *more)
    assert done.status == 2 and says in done.err, done.err


def test_reports_say_who_served(here):
    how = ["--config", "toy.yaml", "--request-rate", "100", "-p", "fcfs"]
    assert command(*SERVE, *IMAGES, *how, "--out", "sim").status == 0
    ((run,), _) = read_runs(here / "sim")
    serving, scheduler = reports([run])[0].content()["scenario"]["stack"]
    accelerator = serving["standardized"]["accelerator"]
    assert (accelerator["model"], accelerator["count"]) == ("toy device", 1)
    assert (scheduler["metadata"]["label"], scheduler["standardized"]["policy"]) == ("scheduler", "fcfs")
