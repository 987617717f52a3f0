"""Clusters simulated as a whole: heads, instances, schedulers, a network, faults."""

from __future__ import annotations

from collections import Counter

import pytest
from clusters import GRAPH, PROFILES, STREAM, request

from neustream import FCFS, SLO, Pool, Scheduler
from neustream.cluster import messages as say
from neustream.cluster.book import Settings
from neustream.cluster.happenings import Lost, Restarted
from neustream.cluster.head import Head
from neustream.cluster.network import Fault, Network
from neustream.cluster.rules.slack import Slack
from neustream.cluster.simulation import Cluster, Kind
from neustream.core.events import Emitted, Ended
from neustream.engine.events import Call, Started
from neustream.engine.executor import ProfiledExecutor


def kind(count: int, **options) -> Kind:
    def make(place):
        scheduler = Scheduler([Pool("gpu", tuple(PROFILES))], FCFS(drop_hopeless=False), PROFILES)
        return scheduler, {"gpu": ProfiledExecutor(stretch=place.stretch)}

    return Kind("whole", "", count, make, **options)


class Run:
    """A cluster that has served some requests."""

    def __init__(self, requests, count=2, *, faults=(), network=None, settings=None, again=None, **rules):
        self.happened, self.ended, self.emitted, self.steps = [], {}, {}, Counter()
        router = rules.pop("router", Slack())
        again = again or {"stream": "repeat", "image": "repeat"}

        def begin(epoch):
            return Head([GRAPH, STREAM], {"": PROFILES}, router, settings=settings, again=again, epoch=epoch, **rules)

        network = network or Network(delay_s=0.001)
        self.cluster = Cluster(
            begin(0),
            [kind(count)],
            [GRAPH, STREAM],
            network,
            faults=faults,
            successor=begin,
            watchers=[self.happened.append],
        )
        self.report = self.cluster.run(requests, [self._observe])

    def _observe(self, record):
        if isinstance(record, Ended):
            assert record.id not in self.ended, "answered twice"
            self.ended[record.id] = record
        elif isinstance(record, Emitted):
            self.emitted.setdefault(record.id, []).append(record.index)
        elif isinstance(record, Started):
            self.steps.update(record.step.ids)

    def of(self, what):
        return [event for event in self.happened if isinstance(event, what)]


def stream_of(count, every=0.05, **options):
    return [request(str(n), arrival=n * every, graph=STREAM, **options) for n in range(count)]


def test_all_requests_are_answered_by_both_instances():
    run = Run([request(str(n), arrival=0.2 * n, slo=SLO(total=3.0)) for n in range(40)])
    assert run.report.counts == {"on_time": 40, "late": 0, "dropped": 0, "failed": 0, "cancelled": 0}
    assert {ended.member for ended in run.ended.values()} == {"whole-0", "whole-1"}
    assert run.cluster.head.open == 0 and not any(each.drive.scheduler.jobs for each in run.cluster.running.values())


def test_one_instance_answers_as_the_engine_does_but_for_the_network():
    run = Run([request("r", steps=5)], count=1, network=Network(delay_s=0.25))
    assert run.ended["r"].latency_s == pytest.approx(5 * 0.1 + 0.1 + 2 * 0.25)


@pytest.mark.parametrize("fault", ["crash", "hang", "partition", "slow"])
def test_whatever_an_instance_does_each_request_is_answered_once_in_order(fault):
    faults = [Fault(0.52, 0, fault, 8.0, factor=5.0)]
    run = Run(stream_of(20), faults=faults)
    assert {ended.status for ended in run.ended.values()} == {"done"} and len(run.ended) == 20
    assert all(indices == [0, 1, 2] for indices in run.emitted.values())
    assert [event.instance for event in run.of(Lost)] == ([] if fault == "slow" else ["whole-0"])
    assert bool(run.of(Restarted)) == (fault != "slow")


@pytest.mark.parametrize("fault", ["hang", "partition"])
def test_an_instance_that_comes_back_serves_again(fault):
    settings = Settings(suspect_s=0.6, dead_s=1.0)
    run = Run(stream_of(60, every=0.1), faults=[Fault(0.52, 0, fault, 2.0)], settings=settings)
    late = [ended.member for ended in run.ended.values() if ended.arrival > 4.0]
    assert set(late) == {"whole-0", "whole-1"}
    assert len(run.ended) == 60


def test_a_short_silence_is_no_death():
    run = Run(stream_of(20), faults=[Fault(0.52, 0, "partition", 1.0)])
    assert not run.of(Lost) and not run.of(Restarted)


def test_when_all_are_gone_requests_end_with_a_reason():
    faults = [Fault(0.5, number, "crash") for number in (0, 1)]
    run = Run([request(str(n), 0.1 * n, SLO(total=2.0)) for n in range(10)], faults=faults)
    assert run.report.counts["failed"] == 10 - run.report.counts["on_time"] > 3
    reasons = {ended.reason.partition(":")[0] for ended in run.ended.values() if ended.status == "failed"}
    assert "no instance serves stage 'step'" in reasons


def test_a_network_that_loses_messages_only_delays_them():
    run = Run(stream_of(20), network=Network(delay_s=0.01, loss=0.3, seed=1))
    assert len(run.ended) == 20 and all(indices == [0, 1, 2] for indices in run.emitted.values())


def test_a_request_that_is_sent_again_in_the_instant_in_which_it_ends_is_not_taken_for_what_ended():
    head = Head([STREAM], {"": PROFILES}, Slack())
    cluster = Cluster(head, [kind(1)], [STREAM], Network())
    told = []
    heard = head.heard
    head.heard = lambda instance, message, now: (told.append((message, now)), heard(instance, message, now))
    again = say.Send("whole-0", "r", 2, "stream", SLO(), {"steps": 3}, 0.0, 0.0, 2)
    ends_at = 0.1 + 0.1 + 0.1
    cluster.clock.post(Call(lambda now: cluster._arrived("whole-0", [again], now), rank=9), ends_at)
    cluster.run([request("r", graph=STREAM)])
    (ended,) = [(message, at) for message, at in told if isinstance(message, say.Over)]
    assert ended[0].term == 1 and ended[1] == ends_at
    assert (say.Took("r", 2), ends_at) in told
