"""The dashboard without a browser: its parts, its feed, and the figures in it."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, stock, text_service  # noqa: E402
from test_metrics import replayed  # noqa: E402

from neustream import EventLog  # noqa: E402
from neustream.server.metrics import Metrics  # noqa: E402
from neustream.server.observe.board import MOST_OPEN, POINTS, Board  # noqa: E402
from neustream.server.observe.gauges import Gauges  # noqa: E402
from neustream.server.observe.lives import Lives  # noqa: E402
from neustream.server.ui import CONTENT, MOST_VIEWERS, PARTS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ASK = {"prompt": "Once upon", "max_tokens": 12, "ignore_eos": True, "slo": {"ttft_ms": 60_000, "tpot_ms": 60_000}}


@pytest.fixture(scope="module")
def model():
    return stock()


@pytest.fixture
def client(model):
    with serving(partial(text_service, model), keys=["secret"]) as (url, said, _):
        assert said.get(timeout=60) == "ready: tiny"
        with httpx.Client(base_url=url, timeout=60, headers={"authorization": "Bearer secret"}) as client:
            yield client


def first_of(stream):
    return json.loads(next(line for line in stream.iter_lines() if line).removeprefix("data: "))


# -- its parts ------------------------------------------------------------------------------------------


def test_it_is_small_and_loads_nothing_from_elsewhere():
    assert sum(map(len, CONTENT.values())) < 40_000
    for path, content in CONTENT.items():
        assert b"innerHTML" not in content and b"eval(" not in content, path
        assert not re.search(rb'(?:src|href|from|url\(|fetch\()\s*=?\s*["\']?https?:', content), path
    page = CONTENT["/ui"].decode()
    assert (
        not re.search(r"<script(?![^>]*src=)", page) and "style=" not in page and " on" not in page.split("<body>")[0]
    )
    assert set(re.findall(r'(?:src|href)="(/[^"]*)"', page)) <= set(PARTS)


def test_its_parts_need_no_key_and_forbid_all_that_is_not_theirs(client):
    for path, (_, media) in PARTS.items():
        answer = httpx.get(f"{client.base_url}{path}")
        assert answer.status_code == 200 and answer.headers["content-type"] == media
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{client.base_url}/ui/events").status_code == 401


# -- its feed -------------------------------------------------------------------------------------------


def test_the_feed_tells_what_became_of_requests(client):
    assert client.post("/v1/completions", json=ASK).status_code == 200
    assert client.post("/v1/completions", json={**ASK, "max_tokens": -1}).status_code == 400
    with client.stream("GET", "/ui/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        shot = first_of(stream)
    assert shot["state"] == "ready" and shot["refused"] == {"invalid": 1}
    assert shot["classes"][""]["all"][:2] == [1, 1], "what is wrong is no promise broken"
    assert shot["running"] == shot["waiting"] == 0
    ((_, kind, asked, latency_s, outcome),) = shot["dots"]
    assert (kind, asked, outcome) == ("text", 12, "on_time") and latency_s > 0
    assert shot["kv"] == {"llm": [0, 8]} and {line["model"] for line in shot["modules"]} == {"tiny"}


def test_so_many_may_watch_and_no_more(client):
    def open_one():
        answer = client.send(client.build_request("GET", "/ui/events"), stream=True)
        lines = answer.iter_lines()  # kept: a response whose lines are forgotten is closed
        next(lines)
        return answer, lines

    watching = [open_one() for _ in range(MOST_VIEWERS)]
    assert {answer.status_code for answer, _ in watching} == {200}
    assert open_one()[0].status_code == 429
    watching.pop()[0].close()
    while (again := open_one())[0].status_code == 429:  # until the server has seen that one left
        pass
    for answer, _ in [*watching, again]:
        answer.close()


def test_who_watches_does_not_hold_up_a_drain(model):
    http = {"shutdown_timeout_s": 1000}
    with serving(partial(text_service, model), http=http) as (url, said, stop):
        said.get(timeout=60)
        with httpx.stream("GET", f"{url}/ui/events", timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert stop() == 0
            shots = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert shots[-1]["state"] == "draining"


def test_it_can_be_left_out(model):
    with serving(partial(text_service, model), observe={"ui": False}) as (url, said, _):
        said.get(timeout=60)
        assert [httpx.get(url + path).status_code for path in ("/ui", "/ui/app.js", "/ui/events")] == [404] * 3


# -- its figures ----------------------------------------------------------------------------------------


def test_figures_add_up_with_the_event_log():
    metrics, log = Metrics(["tiny"]), EventLog()
    report = replayed([log, metrics])
    shot = metrics.snapshot(Gauges("ready"))
    classes = shot["classes"]
    assert sum(of["all"][0] for of in classes.values()) == report.counts["on_time"]
    assert sum(of["all"][1] for of in classes.values()) == len(log.requests) == len(shot["dots"])
    assert set(classes) == {"", "chat"}
    assert classes["chat"]["60s"][0] == classes["chat"]["all"][0]
    last = shot["dots"][-1][0]
    assert metrics.snapshot(Gauges("ready"), last)["dots"] == []
    assert len(metrics.snapshot(Gauges("ready"), last - 3)["dots"]) == 3


def test_points_are_means_of_seconds_and_go_back_two_minutes():
    lives = Lives(["tiny"])
    board = Board(lives.open)
    lives.followers.append(board)
    board.tick(0.0)
    log = EventLog()
    replayed([log, lives])
    board.tick(0.5)
    assert board.snapshot(Gauges("ready"))["tokens_per_s"] == []
    board.tick(1.25)
    shot = board.snapshot(Gauges("ready"))
    outputs = sum(len(request.get("outputs", [])) for request in log.requests.values())
    assert shot["tokens_per_s"] == [outputs]
    sizes = {}
    for step in log.steps:
        sizes.setdefault(lives.module_of(step["stage"])[1], []).append(len(step["jobs"]))
    for line in shot["modules"]:
        of = sizes[line["module"]]
        assert line["batch"] == [round(sum(of) / len(of), 2)] and line["ms"][0] > 0
    board.tick(1000.0)
    shot = board.snapshot(Gauges("ready"))
    assert shot["tokens_per_s"] == [0] * POINTS and shot["modules"][0]["batch"] == [None] * POINTS
    assert shot["classes"]["chat"]["60s"][:2] == [0, 0] and shot["classes"]["chat"]["all"][1] > 0


def test_open_requests_are_told_with_their_slack():
    metrics = Metrics(["tiny"])
    replayed([metrics], MOST_OPEN * 2)
    told = list(metrics._feed)
    ended = [record for record in told if type(record).__name__ == "Ended"]
    metrics._feed.clear()
    metrics._feed.extend(record for record in told if record not in ended)
    rows = metrics.snapshot(Gauges("ready", now=0.02))["open"]
    assert len(rows) == MOST_OPEN
    slacks = [slack for *_, slack, _ in rows]
    assert slacks == sorted(slacks) and slacks[0] < 0
    bare = {id: life for id, life in metrics.lives.open.items() if not life.slo.promises}
    assert {row[-2] for row in Board(bare).snapshot(Gauges("ready"))["open"]} == {None}
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
