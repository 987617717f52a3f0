"""A service begins and ends: closed in every state, forgotten, left at the interpreter's exit."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
from toys import Gate, one_stage, table
from words import ONE, Words, chat, chatting

from neustream import (
    BackendError,
    RequestCancelled,
    RequestError,
    serve,
)
from neustream.service.graphs import GraphMount

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
