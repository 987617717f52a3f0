"""Mounts that look at a request first, and rehearse while nobody asks for anything."""

from __future__ import annotations

import threading
import time

import pytest
from toys import Gate, Step, one_stage, table
from words import ONE, Fails, Words

from neustream import (
    FCFS,
    SLO,
    EventLog,
    Graph,
    RequestError,
    RequestFailed,
    Stage,
    StageFailed,
    loop,
    serve,
)
from neustream.service.graphs import GraphMount
from neustream.service.mount import Call, Instance, Probe

# -- looks and rehearsals -----------------------------------------------------------------------------


class Curious(GraphMount):
    """Looks at each request first, opens stages for the kind it has, and rehearses when it idles."""

    def __init__(self, rehearse=0):
        self.probe = Graph("probe", Stage("probe", max_batch=1, emits=True))
        super().__init__(self.probe, {"probe": Step()}, {"probe": table("probe", 0.001)})
        self.rehearse, self.over, self.begun = rehearse, [], threading.Event()
        self.known = {}

    def open(self, name, devices, host):
        self.host = host
        return super().open(name, devices, host)

    def request(self, kind, error=None, steps=1):
        then = lambda result: self._call(kind, error, steps)  # noqa: E731
        return Probe(self.probe, {"kind": kind}, then, lambda: self._over(kind))

    def _over(self, kind):
        self.over.append(kind)

    def _call(self, kind, error, steps):
        if error is not None:
            raise error
        if kind not in self.known:
            stage = Stage(kind, max_batch=8, emits=True)
            self.known[kind] = Graph(kind, loop(stage, times=lambda job: job.params["steps"]))
            profiles = {kind: table(kind, *[0.001] * 8)}
            self.host.extend({"": Instance({kind: Words()}, profiles)})
        return self._of(kind, steps)

    def _of(self, kind, steps):
        value = lambda result, outputs: result.unwrap()["word"]  # noqa: E731
        return Call(self.known[kind], {"steps": steps}, value, over=lambda: self._over(kind))

    def rehearsal(self):
        if not self.rehearse:
            return ()
        self.rehearse -= 1
        self.begun.set()
        return [self._of(next(iter(self.known)), 10**6) for _ in range(2)]

    def forget(self, kind):
        self.host.retire({"": [kind]})
        del self.known[kind]


def test_a_request_that_has_to_be_probed_at_is_one_request():
    log = EventLog()
    mount = Curious()
    with serve(mount, observers=[log]) as service:
        answers = [service.submit(kind, id=kind) for kind in ("a", "b", "c")]
        assert [answer.result(30) for answer in answers] == ["w0"] * 3
        assert service.submit("a").result(30) == "w0"
        with pytest.raises(ZeroDivisionError):
            service.submit("d", error=ZeroDivisionError()).result(30)
    assert service.report.submitted == 4 and service.report.counts["on_time"] == 4
    assert set(log.requests) >= {"a", "b", "c"} and not [id for id in log.requests if id.startswith("~")]
    assert sorted(mount.over) == ["a", "a", "b", "c", "d"]
    looks = [step for step in log.steps if step["stage"] == "probe"]
    assert len(looks) == 5


def test_promises_count_from_before_the_look():
    class Slow(Step):
        def step(self, inputs):
            time.sleep(0.2)
            return super().step(inputs)

    mount = Curious()
    mount._modules = {"probe": Slow()}
    with serve(mount, policy=FCFS(drop_hopeless=False)) as service:
        answer = service.submit("a", slo=0.15)
        assert answer.result(30) == "w0"
        assert not answer.ended.on_time and answer.ended.latency_s >= 0.2


def test_a_request_can_be_cancelled_while_it_is_probed_at():
    gate = Gate()
    mount = Curious()
    mount._modules = {"probe": gate}
    with serve(mount) as service:
        first, second = service.submit("a"), service.submit("b")
        gate.began.wait(30)
        assert first.cancel() and second.cancel()
        gate.go.set()
        assert service.submit("c").result(30) == "w0"
        assert first.outcome(30).status == "cancelled" == second.outcome(30).status
    assert sorted(mount.over) == ["a", "b", "c"] and "a" not in mount.known


def test_a_look_that_fails_is_the_requests_own_failure():
    mount = Curious()
    mount._modules = {"probe": Fails()}
    with serve(mount) as service:
        with pytest.raises(RequestFailed, match=r"request 'mine' was failed: .*no such thing"):
            service.submit("a", id="mine").result(30)
        assert service.submit("b").outcome(30).status == "failed"
    assert mount.over == ["a", "b"]


def test_rehearsals_run_while_nobody_asks_and_end_as_soon_as_somebody_does():
    mount = Curious(rehearse=3)
    with serve(mount) as service:
        assert service.submit("a").result(30) == "w0"
        assert mount.begun.wait(30)
        mount.begun.clear()
        assert service.submit("a").result(30) == "w0"  # would wait for ever behind them
        assert mount.begun.wait(30)
        assert service.report.submitted == 2
    assert mount.over.count("a") == 2 + 2 * (3 - mount.rehearse)


def test_rehearsals_take_nobodys_place():
    mount = Curious(rehearse=3)
    with serve(mount, max_open=1) as service:
        assert service.submit("a").result(30) == "w0"
        for _ in range(2):
            assert mount.begun.wait(30)
            mount.begun.clear()
            assert service.submit("a").result(30) == "w0"  # two rehearsals are open


def test_a_mount_can_be_served_again():
    mount = Curious()
    for _ in range(2):
        mount.known.clear()
        mount._modules = {"probe": Step()}
        with serve(mount) as service:
            assert service.submit("a").result(30) == "w0"


def test_stages_are_forgotten_with_all_that_was_learnt():
    mount = Curious()
    with serve(mount) as service:
        for turn in range(3):
            for kind in ("a", "b"):
                assert service.submit(kind).result(30) == "w0"
            mount.forget("a")
            assert service.submit("b").result(30) == "w0"
            times = service.engine.members[0].scheduler.times
            known = [times.profiles, times.speed, times.spread, service._devices[0].executor._workers[0].modules]
            for table_ in known:
                assert "a" not in table_ and "b" in table_, turn
            assert "a" not in service.engine.members[0].scheduler.pools["device"].stages
        with pytest.raises(RequestError, match="does not serve stage 'a'"):
            service.engine.retire("device", ["a"]).result(30)


def test_stages_that_requests_need_are_not_forgotten():
    gate = Gate()
    with serve(one_stage(), {"s": gate}, ONE) as service:
        answer = service.submit(id="mine")
        gate.began.wait(30)
        with pytest.raises(RequestError, match="stage 's' is needed by request 'mine'"):
            service.engine.retire("device", ["s"]).result(30)
        gate.go.set()
        answer.result(30)


def test_a_stage_may_fail_one_request_and_serve_the_next():
    class Picky(Step):
        def step(self, inputs):
            return [StageFailed("not this one") if given.params.get("bad") else {} for given in inputs]

    with serve(one_stage(), {"s": Picky()}, ONE, slo=SLO(total=30.0)) as service:
        assert service.submit(bad=True).outcome(30).reason == "not this one"
        assert service.submit().outcome(30).on_time
