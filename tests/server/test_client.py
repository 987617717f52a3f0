"""`neustream client`: what it prints of a request, and its exit codes."""

from __future__ import annotations

import copy
import http.server
import json
import socket
import threading
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")

from serving import serving, stock, text_service
from toys import Plain, command

from neustream.server.loading import Loaded

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model():
    return stock()


@pytest.fixture(scope="module")
def running(model):
    loaded = []

    def load(metrics):
        loaded.append(text_service(model, metrics))
        return loaded[0]

    classes = {"calm": {"e2e_ms": 60_000}}
    with serving(load, promises={"classes": classes}) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        yield url, loaded[0].service


@pytest.fixture
def url(running):
    return running[0]


def ask(url, *args):
    return command("client", "Once upon", "--url", url, *args)


def printable(text):
    return "".join(letter for letter in text if letter.isprintable())


def test_a_text_is_printed_and_its_promise_told(running, tmp_path):
    url, service = running
    path = tmp_path / "one.json"
    done = ask(url, "--max-tokens", 12, "--ttft-ms", 60_000, "--tpot-ms", 30_000, "--json", path)
    alone = service("Once upon", max_tokens=12)
    assert done.status == 0 and json.loads(path.read_text())["text"] == alone.text
    assert printable(done.out) == printable(alone.text)  # what a terminal would obey is left out
    assert done.err.startswith("on time\n") and "60,000.0" in done.err and "by the server" in done.err


def test_a_chat_a_class_and_json(url, tmp_path):
    path = tmp_path / "one.json"
    done = ask(url, "--chat", "--max-tokens", 5, "--class", "calm", "--json", path)
    said = json.loads(path.read_text())
    assert done.status == 0 and said["outcome"] == "on_time" and said["promised"] == {"e2e": 60.0}
    assert said["tokens"] == 5 and 0 < said["ttft_s"] <= said["e2e_s"] and said["server"]["on_time"]
    alone = json.loads(ask(url, "--max-tokens", 2, "--json", "-", "-q").out)
    assert (alone["outcome"], alone["promised"], alone["status"]) == ("done", {}, 200)


def test_a_chat_template_that_raises_is_told(model):
    def load(metrics):
        loaded = text_service(model, metrics)
        (tiny,) = loaded.models
        words = copy.deepcopy(tiny.tokenizer)
        words.chat_template = "{{ raise_exception('roles must alternate') }}"
        return Loaded(loaded.service, [replace(tiny, tokenizer=words)])

    with serving(load) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        done = ask(url, "--chat", "--max-tokens", 5)
        assert done.status == 2 and done.out == "" and "Traceback" not in done.err
        assert "the chat template: " in done.err and "roles must alternate" in done.err
        assert ask(url, "--max-tokens", 5).status == 0  # texts need no template


def test_late_is_3(model):
    with serving(partial(text_service, model, policy=Plain())) as (url, said, _):
        said.get(timeout=60)
        done = ask(url, "--e2e-ms", 0.01)
        assert done.status == 3 and done.out and done.err.startswith("late\n")


def test_given_up_is_4_and_why(url):
    done = ask(url, "--e2e-ms", 0.01)
    assert (done.status, done.out) == (4, "") and done.err.startswith("dropped (unattainable, status 400): ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tony"], "did you mean 'tiny'"),
        (["--out", "x.png"], "one of images is needed; served: tiny"),
        (["--model", "tiny", "--out", "x.png"], "makes texts: a text goes to stdout"),
        (["--steps", "5"], "--steps is nothing for a model that makes texts"),
        (["--max-tokens", "500"], "at most max_tokens="),
        (["--class", "wild"], "no class 'wild'"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere"),
        (["--ttft-ms", "0"], "--ttft-ms"),
    ],
)
def test_what_is_wrong_is_2_and_told(url, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = ask(url, *arguments)
    assert done.status == 2 and message in done.err and "Traceback" not in done.err


def test_keys(model, tmp_path, monkeypatch):
    with serving(partial(text_service, model), keys=["secret"]) as (url, said, _):
        said.get(timeout=60)
        assert "a key is needed" in ask(url).err
        (tmp_path / "key").write_text("secret\n")
        assert ask(url, "--api-key-file", tmp_path / "key").status == 0
        monkeypatch.setenv("NEUSTREAM_API_KEY", "secret")
        assert ask(url).status == 0


def test_nobody_there_is_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = ask(f"http://127.0.0.1:{port}")
    assert done.status == 2 and f"127.0.0.1:{port}: ConnectionRefusedError" in done.err
    assert ask("nonsense").status == 2


class Foreign(http.server.BaseHTTPRequestHandler):
    """A server that knows no promises, or breaks: what it streams is `answer`."""

    answer = b""

    def do_GET(self):
        content = b'{"data": [{"id": "theirs"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *args):
        pass


CHUNK = b'data: {"choices": [{"text": "a"}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (CHUNK + b"data: [DONE]\n\n", 0, "done, nothing was promised"),
        (CHUNK, 5, "the stream was cut"),
        (b"data: [DO", 5, "the stream broke"),
        (CHUNK + b"data: [1]\n\n", 5, "the stream broke"),
        (
            CHUNK + b'data: {"error": {"message": "no room", "code": "late"}}\n\n',
            4,
            "dropped (late, status 200): no room",
        ),
        (CHUNK + b'data: {"error": {"message": "broke", "code": null}}\n\n', 5, "failed (error, status 200): broke"),
    ],
)
def test_streams_of_others(answer, status, message):
    kind = type("Answers", (Foreign,), {"answer": answer})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as there:
        thread = threading.Thread(target=there.serve_forever)
        thread.start()
        done = ask(f"http://127.0.0.1:{there.server_port}")
        there.shutdown()
        thread.join()
    assert done.status == status and message in done.err
    assert done.out == ("a\n" if CHUNK in answer else "")
