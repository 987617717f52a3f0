"""The HTTP front with a cluster behind it: instances in this process; a lost one; what cannot be served."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

for name in ("torch", "transformers", "uvicorn", "httptools", "httpx"):
    pytest.importorskip(name, reason="needs the extras 'llm' and 'serve'")

import httpx  # noqa: E402
from local_machines import LocalMachines, through  # noqa: E402
from serving import serving  # noqa: E402
from test_metrics import Told  # noqa: E402
from toys import command, squash  # noqa: E402

from neustream import BackendError  # noqa: E402
from neustream.backends.demo import TEXT  # noqa: E402
from neustream.backends.ray import cluster, front  # noqa: E402
from neustream.cluster.happenings import Moved, Routed, Unmoved  # noqa: E402
from neustream.core.events import Emitted, Ended, Submitted  # noqa: E402
from neustream.core.forecasts import Forecast  # noqa: E402
from neustream.core.types import SLO  # noqa: E402
from neustream.server.config import ModelConfig, ServerConfig  # noqa: E402
from neustream.server.metrics import Metrics  # noqa: E402
from neustream.server.observe.gauges import Gauges  # noqa: E402
from neustream.server.observe.table import Table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PATIENT = {"suspect_s": 60, "dead_s": 90, "send_s": 60}
OPTIONS = {"measure_s": 0.1, "slots": 4}
TINY = {"name": "tiny", "kind": "text", "backend": TEXT, "tokenizer": "bytes", "options": OPTIONS}


UP = ("up", "whole")


def until(true):
    """Wait for what another thread does."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_routes_readiness_and_figures_of_each_instance(monkeypatch):
    made = []

    def machines(kinds, address, *, observed, start_s):
        made.append(LocalMachines(lambda number, kind: through(kinds[kind].make)("cpu"), observed=observed))
        return made[0]

    monkeypatch.setattr(cluster, "machines_of", machines)
    section = {"instances": 2, "router": "round_robin", "failure": PATIENT}
    settings = ServerConfig(models=[ModelConfig(**TINY)], cluster=section)
    with serving(lambda metrics: front.load(settings, metrics)) as (url, said, stop):
        assert said.get(timeout=120) == "ready: tiny"

        def told():
            time.sleep(0.3)  # the page is rendered so often
            return Told(httpx.get(f"{url}/metrics").text)

        def ask(tokens=4, **body):
            asked = {"model": "tiny", "prompt": "hello", "max_tokens": tokens, "ignore_eos": True, **body}
            return httpx.post(f"{url}/v1/completions", json=asked, timeout=60)

        assert httpx.get(f"{url}/ready").status_code == 200
        first = [ask(seed=1, slo={"e2e_ms": 60_000}).json() for _ in range(4)]
        assert {answer["choices"][0]["text"] for answer in first} == {first[0]["choices"][0]["text"]}
        assert all(answer["usage"]["completion_tokens"] == 4 for answer in first)
        page = told()
        names = ("whole-1", "whole-2")
        assert [page("instance_routed_total", member=name) for name in names] == [2, 2]
        assert [page("instance_slo_attained_total", member=name) for name in names] == [2, 2]
        assert page("instances", state="up") == 2 and page("ready") == 1
        assert page("instance_backlog_seconds", member=names[0]) >= 0 and page("outlook_age_seconds") > 0
        assert page("forecast_error_seconds_count") == 0, "round_robin asks for no forecast"
        until(lambda: told()("step_batch_size_count") >= 16)  # prefills and decodes of both
        assert httpx.get(f"{url}/stats").json()["total-tokens-handled"] == 16
        done = command("cluster", "status", url.removeprefix("http://"), "--json", "-")
        assert done.status == 0 and squash("ready, 0 open") in squash(done.err), done.err
        assert all(name in done.err for name in names), "names are whole"
        shown = json.loads(done.out)["instances"]
        assert {name: (each["state"], each["role"]) for name, each in shown.items()} == dict.fromkeys(names, UP)
        with httpx.stream("GET", f"{url}/ui/events") as stream:
            shot = json.loads(next(line for line in stream.iter_lines() if line).removeprefix("data: "))
        assert set(shot["cluster"]["instances"]) == set(names) and shot["cluster"]["lost"] == 0

        made[0].make = lambda number: 1 / 0  # the one in its place does not start
        made[0].die("whole-1")
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        shown = httpx.get(f"{url}/ready").json()
        assert (shown["state"], shown["reason"]) == ("short", "1 of 2 instances are up")
        done = command("cluster", "status", url)
        assert done.status == 3 and squash("short (1 of 2 instances are up), 0 open") in squash(done.out)
        assert "lost: 1 instances" in done.out and "whole-1" not in done.out
        assert ask().status_code == 200
        page = told()
        assert page("instances", state="up") == 1 and page("ready") == 0 and page("instances_lost_total") == 1
        assert stop() == 0


def test_a_request_that_ends_before_its_route_is_told_of_is_at_no_instance():
    figures = front.Figures(Table())
    for id in ("a", "b"):
        figures(Submitted(id, "chat", 0.0, math.inf, SLO(), 1, 0.0))
    figures(Ended("a", "cancelled", "", None, False, 0.0, 0.0, SLO(), 0))
    for id in ("a", "b"):
        figures.happened(Routed(id, 1, "whole-1", "", 0.0))
    assert figures.live == {"whole-1": 1}


def test_moves_and_forecasts_are_told_with_what_became_of_them():
    """`a` ends where it was foretold, `b` moved away, and nobody asked for a forecast of `c`."""
    metrics = Metrics(["tiny"])
    figures = front.Figures(metrics.table)
    for id in "abc":
        figures(Submitted(id, "chat", 0.0, math.inf, SLO(), 1, 0.0))
        forecast = None if id == "c" else Forecast(id == "a", 3.0, 1.0, 1.0)
        figures.happened(Routed(id, 1, "whole-1", "", 0.5, forecast=forecast))
        figures(Emitted(id, 0, {}, 1.75, 1.75, member="whole-1"))
    figures.happened(Moved("b", "whole-1", "whole-2", "suspect", 2.0, 2.25))
    figures.happened(Moved("c", "whole-1", "whole-2", "suspect", math.inf, 2.25))
    figures.happened(Unmoved("a", "whole-1", "whole-2", "it is over", 2.5))
    for id, member in zip("abc", ("whole-1", "whole-2", "whole-2"), strict=True):
        figures(Ended(id, "done", "", {}, id == "a", 0.0, 3.25, SLO(), 1, member))
    found = figures.so_far
    assert found.moves == {"suspect": 2} and found.unmoved == {"it is over": 1} and found.downtime_s["p50"] == 0.25
    once = {"on_time": 1, "not_on_time": 0}
    assert found.forecasts == {"fits": once, "does not fit": {"on_time": 0, "not_on_time": 1}}
    assert found.forecast_error_s["first"]["p50"] == 0.25 and found.forecast_error_s["end"]["p5"] == -0.25
    page = Told(metrics.render(Gauges("ready")))
    assert page("move_downtime_seconds_sum", reason="suspect") == 0.25
    assert page("move_downtime_seconds_count") == 1, "one that never stood still has no downtime"
    assert page("forecast_error_seconds_count", what="first") == 2
    assert page("forecast_error_seconds_bucket", what="end", le="-0.5") == 0
    assert page("forecast_error_seconds_bucket", what="end", le="-0.1") == 1
    assert page("forecast_error_seconds_count", what="end") == 1, "b ended elsewhere"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "Connection refused"),
        ('{"error": {"message": "there is no cluster behind this server"}}', "there is no cluster behind this server"),
        ("{}", "not what a server of this version says"),
        ("[]", "no answer of a neustream server: []"),
        ("<html>", "JSONDecodeError"),
    ],
)
def test_status_of_what_is_no_cluster_is_an_error_with_its_address(answer, said):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if answer and "error" in answer else 200)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"127.0.0.1:{server.server_port}"
        try:
            if answer is None:
                server.shutdown()
                server.socket.close()
            done = command("cluster", "status", url)
        finally:
            server.shutdown()
            thread.join()
    told = squash(done.err)
    assert done.status == 2 and squash(f"BackendError: http://{url}") in told and squash(said) in told
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster": {"instances": 0}}, "cluster.instances"),
        (
            {"cluster": {"instances": 2, "faults": []}},
            "unknown key 'cluster.faults'; allowed: address, engine, failure, instances",
        ),
        ({"cluster": {"instances": 2, "router": {"slack": {}, "random": {}}}}, "cluster.router"),
        ({"cluster": {"instances": 2, "router": "slak"}}, "unknown router 'slak'; did you mean 'slack'?"),
        ({"cluster": {"instances": 2, "scaler": "plan"}}, "cluster.scaler.plan: it is for simulated clusters"),
        ({"cluster": {"instances": 2, "address": "here"}}, "address must be auto or host:port, got 'here'"),
        ({"cluster": {"instances": 2, "name": "prod"}}, "name 'prod': a Ray of its own ends with the front"),
        ({"cluster": {"instances": 2, "address": "auto", "name": "a b"}}, "name must be letters, digits"),
        ({"cluster": {"instances": 2, "lease_s": 9}}, "lease_s 9 is of instances with a name: give name, too"),
        ({"device": "cuda:1"}, "device 'cuda:1': instances of a cluster get theirs; allowed: cpu, cuda"),
        (
            {"kind": "vllm", "path": "x", "tokenizer": None},
            "kind vllm has an engine of its own; a cluster has text, image",
        ),
        ({"kind": "agent", "graph": "a:b"}, "kind agent has tools in this process; a cluster has text, image"),
    ],
)
def test_what_a_cluster_behind_a_front_cannot_have(tmp_path, changes, said):
    import yaml

    section = changes.pop("cluster", {"instances": 2})
    model = {**TINY, **changes}
    if "path" in model or "graph" in model:
        del model["backend"]
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump({"models": [model], "cluster": section}))
    done = command("serve", path, "--check")
    assert done.status == 2 and squash(said) in squash(done.err), done.err
    assert len(done.err.splitlines()) == 1


def test_ray_has_to_be_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = command("serve", "--demo", "--set", "cluster.instances=2", "--check")
    assert done.status == 2 and "BackendError: a cluster needs Ray: pip install 'neustream[ray]'" in done.err


def test_instances_that_outlive_a_front_are_found_by_one_of_the_same_models(monkeypatch):
    asked = []

    def cluster_of(make, **options):
        asked.append(options)
        raise BackendError("asked for")

    monkeypatch.setattr(front, "Cluster", cluster_of)
    lasting = {"instances": 2, "address": "auto", "name": "prod", "lease_s": 9}
    for model, section in (
        (TINY, lasting),
        (TINY, {**lasting, "router": "random", "instances": 3}),
        ({**TINY, "options": {**OPTIONS, "slots": 8}}, lasting),
        (TINY, {"instances": 2}),
    ):
        with pytest.raises(BackendError, match="asked for"):
            front.load(ServerConfig(models=[ModelConfig(**model)], cluster=section), Metrics())
    first, same, other, ending = asked
    assert first["name"].startswith("prod-") and first["lease_s"] == 9
    assert same["name"] == first["name"] != other["name"] and other["name"].startswith("prod-")
    assert "name" not in ending and "lease_s" not in ending
