"""A service: several models and devices behind one `submit`, and what answers tell."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest
from toys import Gate, Step, draw_and_decode, one_stage, table

from neustream import (
    FCFS,
    SLO,
    BackendError,
    ConfigError,
    Decision,
    EventLog,
    Graph,
    ProfileError,
    RequestCancelled,
    RequestDropped,
    RequestError,
    RequestFailed,
    Service,
    Stage,
    StageFailed,
    loop,
    serve,
)
from neustream.service.graphs import GraphMount
from neustream.service.mount import Call, Instance, Probe

ONE = {"s": table("s", 0.001)}


class Words:
    """Emits a word a step."""

    device = "cpu"

    def load(self, device):
        self.device = device

    def step(self, inputs):
        return [{"word": f"w{given.outputs}", "device": self.device} for given in inputs]


def chat(name="say"):
    stage = Stage(name, max_batch=4, emits=True)
    return Graph(f"chat-{name}", loop(stage, times=lambda job: job.params["words"]))


def chatting(name="say", **options):
    return serve(chat(name), {name: Words()}, {name: table(name, *[0.001] * 4)}, **options)


class Refuse:
    """Drops everything."""

    def decide(self, view):
        return Decision([], drop=dict.fromkeys(view.jobs, "no room today"))


class Fails:
    def load(self, device):
        pass

    def step(self, inputs):
        raise LookupError("no such thing")


# -- answers ------------------------------------------------------------------------------------------


def test_an_answer_is_a_future_that_can_be_awaited_and_read():
    async def main(service):
        answer = service.submit(words=3)
        words = [update["word"] async for update in answer]
        return words, await answer

    with chatting() as service:
        assert isinstance(service, Service)
        answer = service.submit({"words": 3}, id="mine")
        assert [update["word"] for update in answer] == ["w0", "w1", "w2"]
        assert answer.result()["word"] == "w2" and answer.id == "mine" and answer.model == ""
        assert answer.ended.on_time and answer.ended.latency_s > 0
        assert [update["word"] for update in answer] == ["w0", "w1", "w2"]  # a later reader
        assert service(words=1)["word"] == "w0"
        assert asyncio.run(main(service)) == (["w0", "w1", "w2"], {"word": "w2", "device": "cpu"})
        outcome = service.submit(words=2).outcome(30)
        assert (outcome.status, outcome.value["word"], outcome.reason) == ("done", "w1", "")
        assert outcome.error is None and outcome.latency_s > 0 and outcome.on_time
    assert service.report.submitted == 4 == service.report.counts["on_time"]


def test_who_comes_to_nothing_learns_why_in_one_way():
    with serve(one_stage(), {"s": Step()}, ONE, policy=Refuse()) as service:
        dropped = service.submit()
        with pytest.raises(RequestDropped, match="was dropped: no room today") as raised:
            dropped.result(30)
        assert (raised.value.status, raised.value.reason) == ("dropped", "no room today")
        assert raised.value.code == "crowded" == dropped.outcome().code  # it never ran
        with pytest.raises(RequestDropped):
            list(dropped)
        outcome = dropped.outcome()
        assert (outcome.status, outcome.reason, outcome.value) == ("dropped", "no room today", None)
        assert outcome.error is raised.value
    with serve(one_stage(), {"s": Fails()}, ONE) as service:
        failed = service.submit()
        with pytest.raises(RequestFailed, match="no such thing") as raised:
            failed.result(30)
        assert raised.value.status == "failed" == failed.outcome().status == failed.outcome().code
        assert raised.value.retry_after_s is None
    gate = Gate()
    with serve(one_stage(), {"s": gate}, ONE) as service:
        mine = service.submit()
        gate.began.wait(30)
        assert mine.cancel() and mine.cancelled()
        with pytest.raises(concurrent.futures.CancelledError):
            mine.result(30)
        assert mine.outcome().status == "cancelled"
        gate.go.set()
    last = Gate()
    service = serve(one_stage(), {"s": last}, ONE)
    theirs = [service.submit() for _ in range(2)]
    closing = threading.Thread(target=service.close, kwargs={"cancel": True})
    closing.start()
    with pytest.raises(RequestCancelled, match="was cancelled"):
        theirs[1].result(30)
    last.go.set()
    closing.join(30)
    assert theirs[1].outcome().status == "cancelled"


def test_a_dropped_request_is_told_when_to_come_again():
    """The pace is that of the requests that were done."""

    class Slow(Step):
        def step(self, inputs):
            time.sleep(0.05)
            return super().step(inputs)

    class Last(FCFS):
        def decide(self, view):
            late = {job: "too many" for job in view.jobs if job.params.get("last")}
            return Decision(FCFS().decide(view).jobs, late) if not late else Decision([], late)

    with serve(one_stage(), {"s": Slow()}, ONE, policy=Last()) as service:
        for _ in range(3):
            service()
        outcome = service.submit(last=True).outcome(30)
        assert outcome.status == "dropped" and 0.01 < outcome.retry_after_s < 1.0


def test_too_many_open_requests_are_refused_with_a_time():
    gate = Gate()
    with serve(one_stage(), {"s": gate}, ONE, max_open=2) as service:
        some = [service.submit() for _ in range(2)]
        with pytest.raises(RequestError, match="max_open is 2") as raised:
            service.submit(id="third").result(30)
        assert raised.value.code == "too_many"
        assert raised.value.status == "refused" and raised.value.retry_after_s is None  # none is done
        gate.go.set()
        for answer in some:
            answer.result(30)
        service.submit(id="third").result(30)


def test_a_reader_that_leaves_and_a_thread_that_dies_harm_nobody():
    with chatting() as service:
        answer = service.submit(words=50)

        def read_one():
            next(iter(answer))

        reader = threading.Thread(target=read_one)
        reader.start()
        reader.join()

        async def leave():
            async for _ in answer:
                break

        asyncio.run(leave())  # its event loop is closed while outputs still come
        assert answer.result(30)["word"] == "w49"
        assert service(words=1)["word"] == "w0"


def test_a_task_that_is_cancelled_gives_its_request_up():
    async def main(service):
        answer = service.submit(words=100_000)
        task = asyncio.ensure_future(asyncio.wait_for(answer, 60))
        async for _ in answer:
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer

    with chatting() as service:
        assert asyncio.run(main(service)).cancelled()
        service(words=1)
        assert service.report.counts["cancelled"] == 1


def test_cancel_by_id():
    gate = Gate()
    with serve(one_stage(), {"s": gate}, ONE) as service:
        service.submit()
        waiting = service.submit(id="mine")
        assert service.cancel("mine") and waiting.cancelled()
        assert not service.cancel("mine") and not service.cancel("nobody's")
        gate.go.set()


# -- several models -----------------------------------------------------------------------------------


def test_several_models_are_decided_by_one_scheduler():
    log = EventLog()
    toys = draw_and_decode()
    steps = {"draw": table("draw", 0.001, 0.001), "decode": table("decode", 0.001)}
    models = {
        "toy": (toys, {"draw": Step(), "decode": Step()}, steps),
        "chat": GraphMount(chat(), {"say": Words()}, {"say": table("say", *[0.001] * 4)}),
    }
    with serve(models, observers=[log], slo=30.0) as service:
        answers = [service.submit(model="toy", steps=3), service.submit(model="chat", words=3)]
        for answer in answers:
            answer.result(30)
        assert answers[1].model == "chat" and set(service.models) == {"toy", "chat"}
        (member,) = service.engine.members
        assert set(member.scheduler.pools["device"].stages) == {"draw", "decode", "say"}
        assert set(service.profiles) == {"draw", "decode", "say"}
        for wrong in (None, "toys", 3):
            with pytest.raises(RequestError, match="allowed: chat, toy"):
                service.submit(model=wrong)
    assert {step["stage"] for step in log.steps} == {"draw", "decode", "say"}


def test_stages_of_two_models_do_not_mix():
    one, two = (one_stage(), {"s": Step()}, ONE), (one_stage(), {"s": Step()}, ONE)
    with pytest.raises(BackendError, match="stage 's' of model 'two' is another model's too"):
        serve({"one": one, "two": two})


@pytest.mark.parametrize(
    ("model", "args", "options", "message"),
    [
        ({}, (), {}, "a service needs a model"),
        ("a checkpoint", (), {}, "serve takes a diffusers pipeline, .* got 'a checkpoint'"),
        ({"": chat()}, (), {}, "a model's name is a word without '/', got ''"),
        ({"a/b": chat()}, (), {}, "got 'a/b'"),
        ({"a": ()}, (), {}, "model 'a' is empty"),
        ({"a": 3}, (), {}, "model 'a': serve takes"),
        ({"a": (chat(), {"say": Words()}, {})}, ({},), {}, r"serve: 1 more argument\(s\) beside several"),
        ({"a": (chat(), {"say": Words()}, {})}, (), {"max_batch": 3}, "serve: 'max_batch' beside several"),
        (chat(), ({}, {"say": table("say", 0.1)}), {}, "stage 'say' of 'chat-say' has no module"),
        (chat(), ({"say": Words()}, {}), {}, "stage 'say' of 'chat-say' has no profile"),
        (chat(), ({"say": Words()}, {"say": table("say", 0.1)}), {"devices": "cpu"}, "devices must be a list"),
        (chat(), ({"say": Words()}, {"say": table("say", 0.1)}), {"devices": []}, "devices must be a list"),
        (chat(), ({"say": Words()}, {"say": table("say", 0.1)}), {"devices": [0]}, "a device is a name"),
        (chat(), ({"say": Words()}, {"say": table("say", 0.1)}), {"devices": ["cpu", "cpu"]}, "modules are a function"),
        (chat(), ({"say": Words()}, {"say": table("say", 0.1)}), {"placement": {"x": ["cpu"]}}, "no model 'x'"),
        (chat(), ({"say": Words()}, {"say": table("say", 0.1)}), {"policy": "fcsf"}, "did you mean 'fcfs'"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(model, args, options, message):
    before = threading.active_count()
    with pytest.raises((BackendError, ConfigError, ProfileError), match=message):
        serve(model, *args, **options)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((3,), {}, "parameters are a mapping, got 3"),
        ((), {"slo": "soon"}, "slo must be an SLO or seconds, got 'soon'"),
        ((), {"slo": True}, "got True"),
        ((), {"slo": -1.0}, "SLO: total must be greater than 0"),
        ((), {"id": "~mine"}, "ids that begin with '~' are the service's"),
        ((), {"id": 3}, "id"),
    ],
)
def test_bad_requests_are_refused_before_they_are_queued(args, options, message):
    with chatting() as service:
        with pytest.raises(RequestError, match=message):
            service.submit(*args, **options)
        assert service(words=1)["word"] == "w0" and service.report.submitted == 1


def test_a_duplicate_id_is_refused_and_free_again_at_the_end():
    gate = Gate()
    with serve(one_stage(), {"s": gate}, ONE) as service:
        first = service.submit(id="twin")
        with pytest.raises(RequestError, match="'twin' is already being served"):
            service.submit(id="twin")
        gate.go.set()
        first.result(30)
        service.submit(id="twin").result(30)


# -- several devices ----------------------------------------------------------------------------------


def test_an_instance_on_each_device():
    made = []

    def modules(device):
        made.append(device)
        return {"say": Words()}

    log = EventLog()
    options = {"devices": ["cpu", "meta", "cpu"], "observers": [log]}
    with serve(chat(), modules, {"say": table("say", *[0.001] * 4)}, **options) as service:
        answers = [service.submit(words=30) for _ in range(12)]
        devices = {answer.result(30)["device"] for answer in answers}
    assert made == ["cpu", "meta", "cpu"] and devices == {"cpu", "meta"}
    assert [member.name for member in service.engine.members] == ["cpu#0", "meta", "cpu#1"]


def test_placement_says_which_models_go_where():
    profiles = {name: {name: table(name, *[0.001] * 4)} for name in ("one", "two", "three")}
    models = {name: (chat(name), lambda device, name=name: {name: Words()}, profiles[name]) for name in profiles}
    placement = {"one": ["cpu"], "two": ["meta"]}
    with serve(models, devices=["cpu", "meta"], placement=placement) as service:
        stages = {member.name: set(member.scheduler.pools["device"].stages) for member in service.engine.members}
        assert stages == {"cpu": {"one", "three"}, "meta": {"two", "three"}}
        assert service(model="one", words=1)["device"] == "cpu"
        assert service(model="two", words=1)["device"] == "meta"
    with pytest.raises(BackendError, match=r"placement: 'one' on 'gpu': .*allowed: cpu, meta"):
        serve(models, devices=["cpu", "meta"], placement={"one": ["gpu"]})


def test_a_device_that_fails_while_another_serves():
    stuck = Gate()

    def modules(device):
        return {"s": stuck if device == "meta" else Step()}

    options = {"devices": ["cpu", "meta"], "step_timeout_s": 0.3}
    with serve(one_stage(), modules, ONE, **options) as service:
        first = [service.submit() for _ in range(4)]
        ends = [answer.outcome(30).status for answer in first]
        assert set(ends) == {"done", "failed"}
        later = [service.submit().outcome(30).status for _ in range(6)]
        assert later == ["done"] * 6
        snapshot = service.snapshot()
        assert snapshot.state == "serving" and set(snapshot.closed) == {"meta/device"}
        stuck.go.set()


# -- beginning and end --------------------------------------------------------------------------------


class Odd(GraphMount):
    """A mount that notes what is done with it, and may be unable to start."""

    def __init__(self, name, error=None):
        super().__init__(chat(name), {name: Words()}, {name: table(name, *[0.001] * 4)})
        self.calls, self.error = [], error

    def open(self, name, devices, host):
        self.calls.append("open")
        if self.error is not None:
            raise self.error
        return super().open(name, devices, host)

    def close(self):
        self.calls.append("close")


@pytest.mark.parametrize("error", [BackendError("no memory"), KeyError("a bug"), KeyboardInterrupt()])
def test_a_mount_that_cannot_start_takes_the_others_with_it(error):
    before = threading.active_count()
    first, second, third = Odd("a"), Odd("b", error), Odd("c")
    with pytest.raises(type(error)) as raised:
        serve({"a": first, "b": second, "c": third})
    if isinstance(error, BackendError):
        assert str(raised.value) == "model 'b': no memory"
    assert (first.calls, second.calls, third.calls) == (["open", "close"], ["open", "close"], [])
    assert threading.active_count() == before
    with serve({"a": first, "c": third}) as service:  # they can be served after that
        assert service(model="a", words=1)["word"] == "w0"
    assert third.calls == ["open", "close"]


def test_closing_in_every_state():
    service = chatting()
    service.close()
    service.close()  # twice
    with pytest.raises(RequestError, match="not serving"):
        service.submit(words=1)
    assert service.snapshot().state == "closed"

    with chatting() as service:
        answer = service.submit(words=30)
    assert answer.result(0)["word"] == "w29"  # what is open is served

    def leave():
        with chatting() as service:
            leave.answer = service.submit(words=10**6)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        leave()
    with pytest.raises(RequestCancelled):
        leave.answer.result(30)

    with chatting() as service:  # in a callback, on the engine's own thread
        told = concurrent.futures.Future()

        def close_there(_):
            try:
                service.close()
            except RequestError as error:
                told.set_result(str(error))

        service.submit(words=1).add_done_callback(close_there)
        assert "cannot be called on it" in told.result(30)
        assert service.submit(words=1).outcome(30).status in ("done", "refused")


def test_close_gives_up_after_a_while():
    gate = Gate()
    service = serve(one_stage(), {"s": gate}, ONE)
    answers = [service.submit() for _ in range(3)]
    threading.Timer(0.3, gate.go.set).start()
    service.close(timeout_s=0.05)
    assert [answer.outcome(0).status for answer in answers][1:] == ["cancelled"] * 2


def test_a_closed_service_is_collected():
    module = Words()
    with serve(chat(), {"say": module}, {"say": table("say", *[0.001] * 4)}) as service:
        service(words=3)
    gone = weakref.ref(module)
    del module, service
    gc.collect()
    assert gone() is None


def test_after_a_fork_the_child_is_told():
    with chatting() as service:
        service(words=1)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # pragma: no cover  # another process
            try:
                service.submit(words=1)
            except RequestError as error:
                os.write(writing, str(error).encode())
            service.close()  # nothing to do, and no hang
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        assert f"lives in process {os.getpid()}" in os.read(reading, 1000).decode()
        os.close(reading)
        assert service(words=1)["word"] == "w0"


OPEN_AT_EXIT = """
import time
import neustream as ns

class Sleeps:
    def load(self, device): pass
    def step(self, inputs):
        time.sleep(0.05)
        return [{}] * len(inputs)

stage = ns.Stage("s", emits=True)
graph = ns.Graph("g", ns.loop(stage, times=10**6))
service = ns.serve(graph, {"s": Sleeps()}, {"s": ns.TableProfile("s", [1], [0.05])})
answers = [service.submit() for _ in range(3)]
next(iter(answers[0]))
print("leaving", flush=True)
"""


def test_an_interpreter_that_ends_with_open_requests_ends():
    done = subprocess.run([sys.executable, "-c", OPEN_AT_EXIT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


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
