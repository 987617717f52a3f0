"""Signals, models that cannot be loaded, engines that die: what is told, and that others go on."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from dataclasses import replace  # noqa: E402
from types import SimpleNamespace  # noqa: E402

from serving import serving, stock, text_service  # noqa: E402
from toys import Flat  # noqa: E402

from neustream import BackendError  # noqa: E402
from neustream.backends.demo import TEXT  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.server.config import ServerConfig  # noqa: E402
from neustream.server.loading import Loaded  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return stock()


def until(done, seconds=30.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill(service):
    """Break an engine's loop."""
    engine = service.engine
    engine.clock.post(SimpleNamespace(rank=0), engine.clock.now())
    until(lambda: engine.snapshot().state == "failed")


def listens(url):
    try:
        return httpx.get(f"{url}/health", timeout=60).status_code > 0
    except httpx.TransportError:
        return False


# -- loading ------------------------------------------------------------------------------------------


def test_a_signal_does_not_wait_for_what_still_loads(model):
    go, loaded = threading.Event(), []

    def slow(metrics):
        assert go.wait(60)
        loaded.append(text_service(model, metrics))
        return loaded[0]

    with serving(slow) as (url, _, stop):
        assert httpx.get(f"{url}/ready", timeout=60).json()["state"] == "loading"
        assert stop() == 0
    go.set()  # what comes too late is closed again
    until(lambda: loaded and loaded[0].service.snapshot().state == "closed")


def config(*models):
    texts = {"profile": Flat(), "slots": 4}
    known = {"kind": "text", "backend": TEXT, "tokenizer": "bytes", "options": texts}
    return ServerConfig.model_validate({"models": [{**known, **one} for one in models]})


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"backend": None, "path": "no/such/folder"}, "'no/such/folder' is no folder"),
        ({"backend": {**TEXT, "model_type": "nothing"}}, "nothing"),
        ({"options": {"slots": -1}}, "slots must be"),
        ({"options": {"slots": 10**9}}, "no memory"),
    ],
)
def test_a_model_that_cannot_be_loaded_does_not_keep_others_from_serving(bad, why):
    settings = config({"name": "good"}, {"name": "bad", **bad})
    with serving(partial(load, settings)) as (url, said, stop), httpx.Client(base_url=url, timeout=60) as client:
        assert said.get(timeout=60) == "ready: good"
        told = client.get("/ready")
        assert told.status_code == 503 and told.json()["state"] == "failed" and int(told.headers["retry-after"]) >= 1
        assert "model 'bad'" in told.json()["reason"] and why in told.json()["models"]["bad"]
        assert told.json()["models"]["good"] == "ready"
        assert client.get("/health").status_code == 200  # no engine has died
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["good"]
        assert client.post("/v1/completions", json={**ASK, "model": "good"}).status_code == 200
        refused = client.post("/v1/completions", json={**ASK, "model": "bad"})
        assert refused.status_code == 503 and why in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json={**ASK, "model": "other"}).status_code == 404
        assert stop() == 0


def test_where_none_is_a_model_all_reasons_are_told():
    settings = config({"name": "a", "backend": None, "path": "x"}, {"name": "b", "backend": None, "path": "y"})
    with pytest.raises(BackendError, match=r"^model 'a': 'x' is no folder; model 'b': 'y' is no folder$"):
        load(settings, lambda record: None)


def test_where_none_can_be_loaded_all_reasons_are_told():
    settings = config({"name": "a", "backend": None, "path": "x"}, {"name": "b", "options": {"slots": -1}})
    with pytest.raises(BackendError, match=r"model 'a': 'x' is no folder; model 'b': slots must be .*"):
        load(settings, lambda record: None)


# -- engines that die ---------------------------------------------------------------------------------


def test_an_engine_that_dies_ends_the_server(model, caplog):
    loaded = []

    def remember(metrics):
        loaded.append(text_service(model, metrics))
        return loaded[0]

    with serving(remember) as (url, said, stop):
        said.get(timeout=60)
        kill(loaded[0].service)
        until(lambda: not listens(url))
        assert stop() == 1
    assert "the engine has died" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["raised", "of an answer"])
def test_a_fault_of_the_server_is_logged_once_with_where_it_was_raised(model, caplog, monkeypatch, stream, how):
    def where_it_was(feeds):
        try:
            raise LookupError("odd")
        except LookupError as error:
            if how == "raised":
                raise
            return [], error

    with serving(partial(text_service, model)) as (url, said, _):
        said.get(timeout=60)
        monkeypatch.setattr("neustream.server.text._taken", where_it_was)
        answer = httpx.post(f"{url}/v1/completions", json={**ASK, "stream": stream}, timeout=60)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
    shown = [record for record in caplog.records if record.exc_info]
    assert len(shown) == 1 and answer.headers["x-request-id"] in shown[0].message
    assert "in where_it_was" in caplog.text and "odd" not in answer.text


def test_an_engine_that_died_is_told_of(model):
    loaded = []

    def remember(metrics):
        loaded.append(text_service(model, metrics))
        return loaded[0]

    with serving(remember, exit_on_engine_death=False) as (url, said, _):
        said.get(timeout=60)
        with httpx.Client(base_url=url, timeout=60) as client:
            events = []
            with client.stream("POST", "/v1/completions", json={**ASK, "max_tokens": 240, "stream": True}) as stream:
                lines = stream.iter_lines()
                events.append(next(lines))
                kill(loaded[0].service)
                with pytest.raises(httpx.RemoteProtocolError):  # cut, behind the reason
                    events += lines
            assert '"error"' in [event for event in events if event][-1]
            assert client.get("/health").status_code == 503
            told = client.get("/ready")
            assert told.status_code == 503 and "the engine has failed" in told.json()["reason"]
            answer = client.post("/v1/completions", json=ASK)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) == 60


class Aside:
    """A service as an engine that one model has to itself."""

    def __init__(self, service):
        self.service = service
        self.jobs = {}

    @property
    def fault(self):
        shot = self.service.snapshot()
        return shot.reason if shot.state == "failed" else ""

    def submit(self, *args, **options):
        return self.service.submit(*args, **options)

    async def close(self):
        self.service.close(cancel=True)


def test_others_go_on_where_one_engine_dies(model):
    asides = []

    def two(metrics):
        first, second = text_service(model, metrics), text_service(model, metrics)
        asides.append(second.service)
        (other,) = second.models
        return Loaded(first.service, [*first.models, replace(other, name="other", own=Aside(second.service))])

    with serving(two) as (url, said, stop), httpx.Client(base_url=url, timeout=60) as client:
        assert said.get(timeout=60) == "ready: tiny, other"
        for name in ("tiny", "other"):
            assert client.post("/v1/completions", json={**ASK, "model": name}).status_code == 200
        assert client.get("/ready").status_code == 200
        kill(asides[0])
        told = client.get("/ready")
        assert told.status_code == 503 and told.json()["models"]["tiny"] == "ready"
        assert told.json()["reason"].startswith("model 'other': ")
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={**ASK, "model": "other"}).status_code == 503
        assert client.post("/v1/completions", json={**ASK, "model": "tiny"}).status_code == 200
        assert client.post("/v1/completions", json=ASK).json()["model"] == "tiny"
        assert stop() == 0


def test_a_step_that_hangs_is_told_of_until_it_comes_back(model):
    loaded, hangs, go = [], threading.Event(), threading.Event()

    def remember(metrics):
        loaded.append(text_service(model, metrics, step_timeout_s=2.0))  # other steps take less on a busy machine too
        return loaded[0]

    with serving(remember, exit_on_engine_death=False) as (url, said, _):
        said.get(timeout=60)
        known = loaded[0].service.models[""].model
        forward = known.forward

        def slow(rows):
            hangs.set()
            assert go.wait(60)
            return forward(rows)

        known.forward = slow
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.post("/v1/completions", json=ASK).status_code == 500
            assert hangs.is_set()
            told = client.get("/ready")
            assert told.status_code == 503 and told.json()["reason"] and client.get("/health").status_code == 503
            assert client.post("/v1/completions", json=ASK).status_code == 503
            known.forward = forward
            go.set()
            until(lambda: client.get("/ready").status_code == 200)
            assert client.post("/v1/completions", json=ASK).status_code == 200


# -- signals ------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
sys.path[:0] = {folders}
import asyncio
from functools import partial
from serving import stock, text_service
from neustream import Decision
from neustream.server.config import ModelConfig, ServerConfig
from neustream.server.lifecycle import leave, run


class Never:
    def decide(self, view):
        return Decision([], wake_at=view.now + 0.05)


def load(metrics):
    {load}

config = ServerConfig(models=[ModelConfig(name="tiny", kind="text", backend={{}})], http={{"port": 0}})
leave(asyncio.run(run(config, load, (), partial(print, flush=True))))
"""
SLEEPS = "time.sleep(600)"
SERVES = "return text_service(stock(), metrics, policy=Never())"


@pytest.fixture
def process(request):
    here = Path(__file__).parent
    script = SCRIPT.format(folders=[str(here), str(here.parent)], load=request.param)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield started, started.stdout.readline().strip().removeprefix("serving on ")
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


@pytest.mark.parametrize("process", [SLEEPS], indirect=True, ids=["loads"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_loads_ends_at_a_signal(process, sent):
    started, url = process
    assert httpx.get(f"{url}/ready", timeout=60).json()["state"] == "loading"
    started.send_signal(sent)
    assert started.wait(30) == 0


@pytest.mark.parametrize("process", [SERVES], indirect=True, ids=["serves"])
def test_the_first_signal_drains_and_the_second_ends_at_once(process):
    started, url = process
    assert started.stdout.readline() == "ready: tiny\n"
    answers = []
    asking = threading.Thread(target=lambda: answers.append(_asked(url)))
    asking.start()
    until(lambda: _open(url) == 1)
    started.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/ready", timeout=60).json()["state"] == "draining")
    refused = httpx.post(f"{url}/v1/completions", json=ASK, timeout=60)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert refused.headers["connection"] == "close"
    assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == 128 + signal.SIGTERM
    asking.join(30)
    assert len(answers) == 1 and answers[0] in (503, "cut")


def _asked(url):
    try:
        return httpx.post(f"{url}/v1/completions", json=ASK, timeout=60).status_code
    except httpx.HTTPError:
        return "cut"


def _open(url):
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    found = [line for line in lines if line.startswith("neustream:num_requests_waiting")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


ARENAS = """
import ctypes, os, sys, threading
from neustream.server.lifecycle import spare_memory
spare_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fopen.restype = ctypes.c_void_p
threads = 6
together = threading.Barrier(threads)
def work():
    libc.malloc(2000)
    together.wait(60)
started = [threading.Thread(target=work) for _ in range(threads)]
for thread in started: thread.start()
for thread in started: thread.join()
file = libc.fopen(sys.argv[1].encode(), b"w")
assert libc.malloc_info(0, ctypes.c_void_p(file)) == 0
libc.fclose(ctypes.c_void_p(file))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not glibc")
@pytest.mark.parametrize(("given", "most"), [({}, 2), ({"MALLOC_ARENA_MAX": "1"}, 1)])
def test_memory_has_few_arenas(tmp_path, given, most):
    path = tmp_path / "arenas.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **given}
    subprocess.run([sys.executable, "-c", ARENAS, path], check=True, timeout=120, env=environment)
    assert 1 <= path.read_text().count("<heap nr=") <= most
