"""A service: several models and devices behind one `submit`, and what answers tell."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time

import pytest
from toys import Gate, Step, draw_and_decode, one_stage, table
from words import ONE, Fails, Refuse, Words, chat, chatting

from neustream import (
    FCFS,
    BackendError,
    ConfigError,
    Decision,
    EventLog,
    ProfileError,
    RequestCancelled,
    RequestDropped,
    RequestError,
    RequestFailed,
    Service,
    serve,
)
from neustream.service.graphs import GraphMount

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


@pytest.mark.parametrize("error", [LookupError("lost"), SystemExit(3), RuntimeError("CUDA error: device-side assert")])
def test_a_device_that_fails_at_once_is_not_given_all_requests(error, caplog):
    """It has the least work left, and stands first: `LeastWork` alone would choose it each time."""

    def breaks(given):
        raise error

    def modules(device):
        return {"s": Step(breaks) if device == "meta" else Step()}

    with serve(one_stage(), modules, ONE, devices=["meta", "cpu"]) as service:
        together = [answer.outcome(30) for answer in [service.submit() for _ in range(12)]]
        assert {outcome.status for outcome in together} == {"done", "failed"}
        one_by_one = [service.submit().outcome(30) for _ in range(8)]
        failed = [outcome for outcome in one_by_one if outcome.status == "failed"]
        assert len(failed) <= 3 and one_by_one[-1].status == "done"
        assert all(type(error).__name__ in outcome.reason or str(error) in outcome.reason for outcome in failed)
        assert service.snapshot().state == "serving"
    assert "member 'meta', stage 's': 3 failed steps in a row; it is passed over for 1 s" in caplog.text


def test_what_fails_everywhere_or_is_the_requests_own_fault_is_not_turned_away():
    """Who alone can serve does, and whoever serves is asked: nothing is refused for steps that failed."""

    def step(given):
        if given.params["bad"]:
            raise LookupError("no such thing")
        return {"out": given.id}

    with serve(one_stage(), lambda device: {"s": Step(step)}, ONE, devices=["meta", "cpu"]) as service:
        bad = [service.submit(bad=True).outcome(30).status for _ in range(8)]
        assert bad == ["failed"] * 8
        assert [service.submit(bad=False).outcome(30).status for _ in range(8)] == ["done"] * 8
