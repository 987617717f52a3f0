"""Whether a server is there, and what it serves."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from neustream.bench.looking import models_of, named
from neustream.bench.plan import Target
from neustream.errors import BackendError


@pytest.fixture
def server():
    """Answers with what is put into `box`: a status and a body."""
    box = {"status": 200, "body": b""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(box["status"])
            self.end_headers()
            self.wfile.write(box["body"])

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", box
        running.shutdown()
        thread.join()


def test_models_for_the_route_come_first(server):
    url, box = server
    models = [{"id": "a", "neustream": {"kind": "text"}}, {"id": "b", "neustream": {"kind": "image"}}, {"id": "c"}]
    box["body"] = json.dumps({"data": models}).encode()
    assert models_of(Target(url)) == ["a", "c", "b"]
    assert models_of(Target(url), images=True) == ["b", "c", "a"]
    assert named(Target(url), ["a"]) == "a"
    with pytest.raises(BackendError, match="serves no model"):
        named(Target(url), [])


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, b"<html>", "no list of models"),
        (200, b"[]", "no list of models"),
        (200, b'{"data": [1]}', "no list of models"),
        (200, b'{"data": [{}]}', "no list of models"),
        (200, b"[" * 100_000, "no list of models"),
        (503, b"", "status 503"),
        (401, b"", "status 401"),
    ],
)
def test_who_answers_otherwise_is_named(server, status, body, says):
    url, box = server
    box.update(status=status, body=body)
    with pytest.raises(BackendError, match=says):
        models_of(Target(url))
