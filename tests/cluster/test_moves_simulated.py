"""Moves with real schedulers on both sides: drain, rescue, copies, legs of roles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
from clusters import GRAPH, PROFILES, request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulation import Run, stream_of

from neustream import FCFS, Graph, KVCache, Pool, Request, Scheduler, TableProfile
from neustream.cluster.book import Settings
from neustream.cluster.fleet import Fleet, Move
from neustream.cluster.happenings import Lost, Moved, Restarted
from neustream.cluster.head import Head
from neustream.cluster.network import Fault, Network
from neustream.cluster.rules import MOVERS, SCALERS
from neustream.cluster.rules.slack import Slack
from neustream.cluster.simulation import Cluster, Kind
from neustream.core.events import Emitted, Ended
from neustream.core.steps import StepProfile
from neustream.engine.executor import ProfiledExecutor
from neustream.graphs import llm, llm_profiles


@dataclass(frozen=True)
class Restless:
    """Moves whatever may be moved to the next instance, again and again."""

    def moves(self, fleet: Fleet) -> list[Move]:
        names = [name for name, one in fleet.instances.items() if one.state == "up"]
        found = []
        for name, other in itertools.pairwise([*names, *names[:1]]):
            for place in fleet.requests(name):
                if place.free and name != other:
                    found.append(Move(place.id, name, other, "restless"))
        return found


BUSY = Settings(move_s=0.03, most_moves=4)


def test_requests_that_move_all_the_time_are_answered_as_those_that_stay():
    stay = Run(stream_of(10, every=0.4, steps=8))
    move = Run(stream_of(10, every=0.4, steps=8), mover=Restless(), settings=BUSY)
    assert len(move.of(Moved)) > 20
    assert move.emitted == stay.emitted and set(move.ended) == set(stay.ended)
    assert {ended.status for ended in move.ended.values()} == {"done"}


def test_images_move_between_any_two_of_their_steps():
    run = Run([request("r", steps=9), request("s", steps=9)], mover=Restless(), settings=BUSY)
    assert len(run.of(Moved)) >= 8
    for event in run.of(Moved):
        assert event.at - event.held_at < 0.01, "there was nothing to carry"
    alone = 9 * 0.12 + 2 * 0.1
    assert max(ended.latency_s for ended in run.ended.values()) < alone + 0.01 * len(run.of(Moved)) + 0.5


def test_moves_wait_for_the_network():
    run = Run([request("r", steps=9)], mover=Restless(), settings=BUSY, network=Network(delay_s=0.05))
    downtimes = [event.at - event.held_at for event in run.of(Moved)]
    assert downtimes and min(downtimes) == pytest.approx(0.15, rel=1e-3)  # give, parcel, took


@dataclass(frozen=True)
class Until:
    """So many instances, from an instant on."""

    counts: tuple[tuple[float, int], ...]

    def target(self, fleet: Fleet) -> dict[str, int]:
        return {"whole": [count for at, count in self.counts if fleet.now >= at][-1]}


def test_a_fleet_grows_and_shrinks_without_a_lost_request():
    scaler = Until(((0.0, 2), (1.0, 4), (3.0, 1)))
    run = Run(stream_of(60, every=0.1), scaler=scaler, settings=Settings(scale_s=0.5, drain_s=30.0))
    assert {ended.status for ended in run.ended.values()} == {"done"} and len(run.ended) == 60
    assert not run.of(Restarted) and not run.of(Lost)
    assert len(run.cluster.running) == 1
    assert len({ended.member for ended in run.ended.values()}) == 4
    assert [event.reason for event in run.of(Moved)] == ["drain"] * len(run.of(Moved))


def test_who_is_lost_is_replaced_once_the_new_one_has_loaded():
    run = Run(stream_of(40, every=0.1), faults=[Fault(1.0, 0, "crash")], scaler=SCALERS["fixed"](2))
    assert set(run.cluster.running) == {"whole-1", "whole-2"}
    assert len(run.ended) == 40 and {ended.status for ended in run.ended.values()} == {"done"}


def text_kind(count: int, blocks: int = 64, **options) -> tuple[Kind, Graph]:
    graph = Graph("text", llm("llm", max_batch=8))
    steps = StepProfile("steps", TableProfile("p", [1, 8], [0.05, 0.2]), TableProfile("d", [1, 8], [0.02, 0.04]))
    profiles = llm_profiles("llm", steps, 8)

    def make(place):
        pool = Pool("gpu", tuple(profiles), kv_caches={"llm": KVCache(blocks, 16)})
        return Scheduler([pool], FCFS(drop_hopeless=False), profiles), {"gpu": ProfiledExecutor()}

    return Kind("whole", "", count, make, **options), graph


@pytest.mark.parametrize("copied", [True, False])
def test_texts_move_with_their_kv_cache_or_are_prefilled_anew(copied):
    one, graph = text_kind(2, token_bytes=1e5 if copied else 0.0)
    happened, emitted, steps = [], {}, []

    def note(record):
        if isinstance(record, Emitted):
            emitted.setdefault(record.id, []).append(record.index)
        elif type(record).__name__ == "Started":
            steps.append(record.step)

    profiles = dict(one.make(None)[0].times.profiles)
    head = Head(
        [graph], {"": profiles}, Slack(), Restless(), settings=replace(BUSY, bandwidth=1e9), again={"text": "replay"}
    )
    cluster = Cluster(head, [one], [graph], Network(0.001, 1e9), watchers=[happened.append])
    cluster.run([Request("r", graph, params={"prompt_tokens": 100, "max_tokens": 40})], [note])
    moves = [event for event in happened if isinstance(event, Moved)]
    assert len(moves) >= 3 and emitted["r"] == list(range(40))
    prefills = [step for step in steps if step.stage == "llm.prefill"]
    assert len(prefills) == (1 if copied else 1 + len(moves))
    for each in cluster.running.values():
        assert each.drive.scheduler.kv_blocks["llm"][0] == 0, "all blocks are free again"


def test_stages_of_roles_are_legs_of_one_way():
    """Denoised at one instance, decoded at another: a leg ends in a move."""

    def role(name, stages, away):
        def make(place):
            here = {stage: PROFILES[stage] for stage in stages}
            there = {stage: PROFILES[stage] for stage in away}
            scheduler = Scheduler([Pool("gpu", stages)], FCFS(drop_hopeless=False), here, away=there)
            return scheduler, {"gpu": ProfiledExecutor()}

        return Kind(name, "", 1, make)

    kinds = [role("denoise", ("step",), ("decode",)), role("decode", ("decode",), ("step",))]
    happened, ended = [], {}
    head = Head([GRAPH], {"": PROFILES}, Slack(), again={"image": "repeat"})
    cluster = Cluster(head, kinds, [GRAPH], Network(0.001), watchers=[happened.append])

    def note(record):
        if isinstance(record, Ended):
            ended[record.id] = record

    cluster.run([request(str(n), 0.3 * n) for n in range(6)], [note])
    assert {one.status for one in ended.values()} == {"done"} and len(ended) == 6
    moved = [event for event in happened if isinstance(event, Moved)]
    assert [(event.source, event.target, event.reason) for event in moved] == [
        ("denoise-0", "decode-1", "stage decode")
    ] * 6
    assert {one.member for one in ended.values()} == {"decode-1"}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_each_request_is_answered_once_whatever_breaks(data):
    """Crashes, hangs, slow devices, partitions and heads that die, while all that may move moves."""
    kinds = st.sampled_from(["crash", "hang", "slow", "partition"])
    count = data.draw(st.integers(2, 3))
    fault = st.builds(Fault, st.floats(0.0, 3.0), st.integers(0, count - 1), kinds, st.floats(0.1, 8.0), st.just(3.0))
    head = st.builds(Fault, st.floats(0.0, 3.0), st.none(), st.just("head"), st.floats(0.001, 3.0))
    faults = data.draw(st.lists(fault, max_size=3)) + data.draw(st.lists(head, max_size=2))
    mover = data.draw(st.sampled_from([None, Restless(), MOVERS["rescue"]()]))
    network = Network(0.002, loss=data.draw(st.sampled_from([0.0, 0.2])), seed=data.draw(st.integers(0, 9)))
    rules = {"scaler": SCALERS["fixed"](count), "settings": replace(BUSY, restarts=9, deaths=9)}
    run = Run(stream_of(12, every=0.1), count, faults=faults, network=network, mover=mover, **rules)
    assert len(run.ended) == 12 and {ended.status for ended in run.ended.values()} == {"done"}
    assert all(indices == [0, 1, 2] for indices in run.emitted.values())
    assert run.cluster.head.open == 0
