"""A cluster on two nodes of a real Ray: real small models, deaths, hangs, moves, and what cannot be."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

import pytest

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
if not hasattr(ray, "init"):
    pytest.skip("needs the extra 'ray'", allow_module_level=True)

import made  # noqa: E402
import psutil  # noqa: E402
from asking import adds_up, gone, said  # noqa: E402

from neustream import BackendError, GraphError, RequestError  # noqa: E402
from neustream.backends.ray import Cluster, Kind, contract  # noqa: E402
from neustream.cluster.book import Settings  # noqa: E402
from neustream.cluster.happenings import Restarted, Saved, Unmoved  # noqa: E402
from neustream.engine.clock import stopwatch  # noqa: E402
from neustream.engine.events import Finished  # noqa: E402

pytestmark = pytest.mark.ray
QUICK = Settings(suspect_s=1.0, dead_s=4.0)


def test_real_models_answer_as_one_service_does(nodes):
    import torch
    from pipelines import requests, tensor_of
    from texts import prompts

    with made.models("cpu") as alone:
        prompt, request = prompts(4)[1], requests("stable_diffusion")[0]
        sampled = {"max_tokens": 8, "temperature": 1.0, "seed": 3}
        texts = [alone.submit(one, model="chat", **sampled).result(60).token_ids for one in prompts(4)]
        image = tensor_of(alone.submit(**request.arguments(), model="sd").result(60))
    stepped, events = threading.Event(), []

    def see(record):
        if isinstance(record, Finished) and "denoise" in record.step.stage and record.step.ids[0].startswith("i"):
            stepped.set()

    with Cluster(made.models, instances=2, address=nodes, observers=[see], watchers=[events.append]) as cluster:
        answers = [cluster.submit(one, model="chat", **sampled) for one in prompts(4)]
        pictures = [cluster.submit(**request.arguments(), model="sd") for _ in range(4)]
        assert [answer.result(120).token_ids for answer in answers] == texts
        assert [[token.id for token in answer] for answer in answers] == [list(text) for text in texts]
        together = [tensor_of(answer.result(120)) for answer in pictures]
        assert all(torch.allclose(picture, image, atol=1e-3) for picture in together)
        assert torch.equal(tensor_of(cluster.submit(**request.arguments(), model="sd").result(120)), image)
        assert {picture.ended.status for picture in pictures} == {"done"}
        with pytest.raises(RequestError, match="the prompt is empty"):
            cluster.submit([], max_tokens=3, model="chat").result(60)
        moving = cluster.submit(prompt, max_tokens=50, ignore_eos=True, model="chat", id="m")
        reading = iter(moving)
        next(reading)
        source = moving.outputs[0].member
        [target] = [name for name in cluster.instances if name != source]
        cluster.move("m", target)
        ids = [token.id for token in moving]
        whole = cluster.submit(prompt, max_tokens=50, ignore_eos=True, model="chat").result(60)
        _move_an_image(cluster, request, stepped, events)
        assert ids == list(moving.result(60).token_ids) == list(whole.token_ids)
        assert adds_up(cluster)
        pids = list(cluster.pids.values())
    assert gone(pids)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
def test_requests_choose_adapters_that_all_instances_have(nodes):
    pytest.importorskip("peft", reason="needs peft")
    from texts import prompts

    most = {"max_tokens": 8, "ignore_eos": True}
    kinds = [(prompt, name) for prompt in prompts(2, seed=3, low=18) for name in ("default", "wide", "__base__", None)]
    with made.adapted("cpu") as alone, Cluster(made.adapted, instances=2, address=nodes) as cluster:
        wanted = [list(alone(prompt, adapter=name, **most).token_ids) for prompt, name in kinds]
        asked = [cluster.submit(prompt, adapter=name, **most) for prompt, name in kinds]
        assert [list(answer.result(60).token_ids) for answer in asked] == wanted
        assert len({*map(tuple, wanted)}) == 6
        for _ in range(3):  # by a look first, then by a guess
            with pytest.raises(RequestError, match="did you mean 'wide'\\? allowed: __base__, default, wide"):
                cluster.submit(kinds[0][0], adapter="wid", **most).result(60)
        assert adds_up(cluster)


def test_texts_that_begin_alike_go_to_one_instance(nodes):
    """The first has 80 tokens to make when the others come."""
    from texts import prompts

    from neustream.cluster.happenings import Routed
    from neustream.cluster.rules.prefix import Prefix

    events = []
    with Cluster(made.text, instances=2, address=nodes, router=Prefix(), watchers=[events.append]) as cluster:
        cluster.submit([3], max_tokens=1).result(60)
        for number in range(20):  # the first may be over before the others are routed
            head, tail, other = prompts(3, seed=5 + number, low=8, high=8)
            first = cluster.submit(head, max_tokens=80, ignore_eos=True, id=f"first{number}")
            alike = cluster.submit([*head, *tail], max_tokens=2, ignore_eos=True, id=f"alike{number}")
            apart = cluster.submit(other, max_tokens=2, ignore_eos=True, id=f"apart{number}")
            assert [len(answer.result(60).token_ids) for answer in (first, alike, apart)] == [80, 2, 2]
            routed = {event.id: event for event in events if isinstance(event, Routed)}
            assert routed[apart.id].reason == "least backlog"
            if routed[alike.id].reason == "8 in common":
                assert routed[alike.id].instance == routed[first.id].instance
                return
    raise AssertionError([event.reason for event in routed.values()])


def _move_an_image(cluster, request, stepped, events):
    """Have one go on in the other process in the middle of its steps: the same bits."""
    from pipelines import tensor_of

    stays = cluster.submit(**request.arguments(), model="sd").result(120)
    before = cluster.counts.moved
    for number in range(20):  # it may be over before it is to move
        stepped.clear()
        answer = cluster.submit(**request.arguments(), model="sd", id=f"i{number}")
        assert stepped.wait(120)
        for target in cluster.instances:
            with contextlib.suppress(RequestError):  # it is there already, or over
                cluster.move(answer.id, target)
                break
        assert (tensor_of(answer.result(120)) == tensor_of(stays)).all()
        if cluster.counts.moved > before:
            return
    raise AssertionError([event.reason for event in events if isinstance(event, Unmoved)])


def test_one_of_two_killed_under_load_loses_nothing_and_another_takes_its_place(nodes):
    with Cluster(made.chat, instances=2, address=nodes) as cluster:
        answers = [cluster.submit(words=20, voice=f"v{at}-") for at in range(200)]
        for answer in answers[:4]:
            next(iter(answer))
        before = dict(cluster.pids)
        os.kill(before["whole-1"], signal.SIGKILL)
        for at, answer in enumerate(answers):
            assert said(answer) == [f"v{at}-{word + 1}" for word in range(20)]
        assert cluster.counts.on_time == 200 and adds_up(cluster)
        assert cluster.counts.lost == 1 and cluster.counts.restarted > 0
        assert "whole-1" not in cluster.instances


def test_one_that_is_stopped_is_found_out_and_ended(nodes):
    """It is stopped while a request of 5 s has begun there, so its end cannot come first."""
    with Cluster(made.chat, instances=2, address=nodes, settings=QUICK) as cluster:
        answers = [cluster.submit(words=100, voice="a") for _ in range(10)]
        long = cluster.submit(words=500, voice="a")
        next(iter(long))
        pid = cluster.pids[long.outputs[0].member]
        os.kill(pid, signal.SIGSTOP)
        assert all(said(answer) == [f"a{at + 1}" for at in range(100)] for answer in answers)
        assert said(long) == [f"a{at + 1}" for at in range(500)]
        assert cluster.counts.lost == 1 and adds_up(cluster)
        assert gone([pid])


def test_a_request_moves_to_another_process_and_back(nodes, record_property):
    with Cluster(made.large, instances=2, address=nodes) as cluster:
        answer = cluster.submit(words=250, voice="a", id="m")
        reading = iter(answer)
        for _ in range(4):
            next(reading)
            source = answer.outputs[-1].member
            moves = cluster.counts.moved
            cluster.move("m", "whole-2" if source == "whole-1" else "whole-1")
            while cluster.counts.moved == moves:
                next(reading)
        list(reading)
        updates = [output.update["item"] for output in answer.outputs]
        assert [update["said"] for update in updates] == list(range(1, 251))
        assert [update["sum"] for update in updates] == [sum(range(said + 1)) for said in range(1, 251)]
        assert len({update["pid"] for update in updates}) == 2
        record_property("downtime of moves, ms", statistics.median(cluster.counts.downtimes_s) * 1e3)


def test_a_request_goes_on_from_its_copy_when_its_process_is_killed(nodes, record_property):
    happened, settings = [], Settings(snapshot_s=0.2)
    with Cluster(made.same, instances=2, address=nodes, settings=settings, watchers=[happened.append]) as cluster:
        answer = cluster.submit(words=250, voice="a", id="m")
        reading = iter(answer)
        while not any(isinstance(event, Saved) for event in happened):
            next(reading)
        os.kill(cluster.pids[answer.outputs[-1].member], signal.SIGKILL)
        list(reading)
        updates = [output.update["item"] for output in answer.outputs]
        assert [update["said"] for update in updates] == list(range(1, 251))
        assert [update["sum"] for update in updates] == [sum(range(said + 1)) for said in range(1, 251)]
        assert len({output.member for output in answer.outputs}) == 2
        assert [event.saved for event in happened if isinstance(event, Restarted)] == [True]
        saved = [event.at - event.held_at for event in happened if isinstance(event, Saved)]
        record_property("a request waits for its copy, ms", statistics.median(saved) * 1e3)


def test_growing_draining_and_a_close_that_serves_what_is_open(nodes):
    cluster = Cluster(made.chat, instances=1, address=nodes)
    try:
        answers = [cluster.submit(words=100, voice="a") for _ in range(4)]
        for answer in answers:
            next(iter(answer))
        cluster.resize(2)
        while len(cluster.instances) < 2:
            next(iter(cluster.submit(words=1, voice="b")))
        cluster.drain("whole-1")
        assert all(said(answer) == [f"a{at + 1}" for at in range(100)] for answer in answers)
        assert cluster.counts.restarted == 0
        last = cluster.submit(words=50, voice="c")
    finally:
        cluster.close()
    assert said(last) == [f"c{at + 1}" for at in range(50)] and adds_up(cluster)
    with pytest.raises(RequestError, match="the cluster is closed"):
        cluster.submit(words=1, voice="a")


def test_an_upgrade_by_the_operations_page_loses_no_request(nodes, tmp_path):
    """Start, grow, drain the old ones in turn, shrink: all under load, and each answer once and whole."""
    path = tmp_path / "version"
    path.write_text("old")
    answers, over = [], threading.Event()
    with Cluster(made.Upgraded(str(path)), instances=1, address=nodes) as cluster:

        def load():
            while not over.wait(0.03):
                answers.append(cluster.submit(words=20, voice="a", slo=60.0))

        def wait(names):
            """Until these instances are up, and no others."""
            until = stopwatch() + 60
            while {name: each.state for name, each in cluster.instances.items()} != dict.fromkeys(names, "up"):
                assert stopwatch() < until, cluster.instances
                time.sleep(0.05)

        client = threading.Thread(target=load)
        client.start()
        try:
            cluster.resize(2)
            wait(["whole-1", "whole-2"])
            path.write_text("new")
            cluster.drain("whole-1")
            wait(["whole-2", "whole-3"])
            cluster.drain("whole-2")
            wait(["whole-3", "whole-4"])
            cluster.resize(1)
            while len(cluster.instances) > 1:
                time.sleep(0.05)
            last = cluster.submit(words=20, voice="a")
            last.result(60)
        finally:
            over.set()
            client.join()
        assert all(said(answer) == [f"a{at + 1}" for at in range(20)] for answer in answers)
        versions = [output.update["item"]["version"] for answer in answers for output in answer.outputs]
        counts = cluster.counts
        assert {*versions} == {"old", "new"} and len(answers) > 50
        assert counts.on_time == counts.submitted == len(answers) + 1, counts
        assert counts.lost == counts.restarted == 0
        assert {output.update["item"]["version"] for output in last.outputs} == {"new"}


def test_kinds_of_instances_take_what_they_need_and_are_replaced_by_their_like(nodes):
    kinds = {"small": Kind(made.chat), "large": Kind(made.chat, resources={"num_cpus": 2})}
    with Cluster(kinds, address=nodes) as cluster:
        assert sorted(cluster.instances) == ["large-2", "small-1"]
        with pytest.raises(BackendError, match="resize: there are several kinds of instances: small, large"):
            cluster.resize(3)
        os.kill(cluster.pids["large-2"], signal.SIGKILL)
        while "large-3" not in cluster.instances:
            assert said(cluster.submit(words=2, voice="a")) == ["a1", "a2"]
        assert sorted(cluster.instances) == ["large-3", "small-1"]
    crowd = {"small": Kind(made.chat, 3), "large": Kind(made.chat, resources={"num_cpus": 2})}
    with pytest.raises(BackendError, match=r"\(3 small, 1 large\) need num_cpus=5 in all; the machines have 4"):
        Cluster(crowd, address=nodes)


def test_a_clock_that_is_an_hour_ahead_changes_nothing(nodes):
    records = []
    with Cluster(made.skewed, instances=1, address=nodes, observers=[records.append]) as cluster:
        began = stopwatch()
        assert said(cluster.submit(words=3, voice="a", slo=60.0)) == ["a1", "a2", "a3"]
        over = stopwatch()
        assert cluster.counts.on_time == 1
    steps = [record.at for record in records if isinstance(record, Finished)]
    assert len(steps) == 3 and all(began - 60 < at <= over for at in steps)


def test_instances_end_with_the_process_of_their_cluster(nodes):
    code = (
        "import sys, time, made; from neustream.backends.ray import Cluster; "
        "cluster = Cluster(made.chat, instances=2, address=sys.argv[1]); "
        "print(*cluster.pids.values(), flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, nodes], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in holder.stdout.readline().split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert gone(pids)


def test_what_cannot_be(nodes, tmp_path):
    with pytest.raises(
        BackendError, match=r"9 instance\(s\) of num_cpus=1 are more than the machines have room for: 4"
    ):
        Cluster(made.chat, instances=9, address=nodes)
    with pytest.raises(BackendError, match=r"address '127.0.0.1:9' does not answer"):
        Cluster(made.chat, address="127.0.0.1:9")
    with pytest.raises(BackendError, match="address must be 'auto' or 'host:port', got 'here'"):
        Cluster(made.chat, address="here")
    raises = made.SecondFails(str(tmp_path / "one"))
    why = r"instance 'whole-\d' on .* \(cpu\): make raised OSError: no such checkpoint"
    with pytest.raises(BackendError, match=why):
        Cluster(raises, instances=2, address=nodes)
    differs = made.SecondFails(str(tmp_path / "two"), made.other_graph)
    with pytest.raises(GraphError, match=r"instance 'whole-\d': its graph 'chat' has print \w+; the one here has"):
        Cluster(differs, instances=2, address=nodes)
    with pytest.raises(BackendError, match=r"make is to return what neustream.serve does, got int"):
        Cluster(len_of, address=nodes)


def test_an_instance_with_other_messages_than_its_head_is_refused(nodes, monkeypatch):
    from neustream.backends.ray import machines

    monkeypatch.setattr(machines, "FORMAT", "another")
    why = r"instance 'whole-1' on .*: its messages have the format \w+, those of its head another: install the same"
    with pytest.raises(BackendError, match=why):
        Cluster(made.chat, address=nodes)


def len_of(device):
    return len(device)


def test_the_contract_holds_for_this_ray():
    contract.check(ray)
