"""Heads of clusters with a name, on a real Ray: what they leave behind, those that come after, and two at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
if not hasattr(ray, "init"):
    pytest.skip("needs the extra 'ray'", allow_module_level=True)

import made  # noqa: E402
from asking import gone, said  # noqa: E402

from neustream import BackendError, RequestError, RequestFailed  # noqa: E402
from neustream.backends.ray import Cluster, machines  # noqa: E402
from neustream.backends.ray import cluster as cluster_module  # noqa: E402
from neustream.backends.ray.cluster import joined  # noqa: E402
from neustream.cluster.epochs import next_epoch  # noqa: E402
from neustream.engine.clock import stopwatch  # noqa: E402

pytestmark = pytest.mark.ray


HOLDER = (
    "import sys, time, made; from neustream.backends.ray import Cluster; "
    "cluster = Cluster(made.chat, instances=2, address=sys.argv[1], name='lasting', lease_s=float(sys.argv[2])); "
    "answers = [cluster.submit(words=500, voice=id, id=id) for id in 'ab']; "
    "[next(iter(answer)) for answer in answers]; "
    "print(*cluster.pids.values(), flush=True); time.sleep(600)"
)


def held(nodes, lease_s):
    """The processes of two instances whose cluster's process was killed while they served."""
    arguments = [sys.executable, "-c", HOLDER, nodes, str(lease_s)]
    holder = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in holder.stdout.readline().split()]
        assert len(pids) == 2
        return pids
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_instances_with_a_name_outlive_the_process_of_their_cluster(nodes):
    pids = held(nodes, 60.0)
    with Cluster(made.chat, instances=2, address=nodes, name="lasting", lease_s=60.0) as cluster:
        assert sorted(cluster.pids.values()) == sorted(pids)
        answers = [cluster.submit(words=500, voice=id, id=id) for id in "ab"]
        assert [said(answer) for answer in answers] == [[f"{id}{n}" for n in range(1, 501)] for id in "ab"]
        assert cluster.counts.on_time == 2 and not cluster.counts.restarted
        assert said(cluster.submit(words=2, voice="c")) == ["c1", "c2"]
    assert gone(pids)


def test_without_another_head_they_end_with_their_lease(nodes):
    assert gone(held(nodes, 2.0))


def test_a_second_cluster_of_a_name_takes_the_place_of_the_first(nodes):
    first = Cluster(made.chat, instances=1, address=nodes, name="two")
    try:
        answer = first.submit(words=500, voice="a", id="a")
        assert next(iter(answer))["word"] == "a1"
        with Cluster(made.chat, instances=1, address=nodes, name="two") as second:
            assert second.pids == first.pids
            with pytest.raises(RequestFailed, match="another process is the head of this cluster by now"):
                answer.result(60)
            assert said(second.submit(words=500, voice="a", id="a"))[-1] == "a500"
            with pytest.raises(RequestError, match="another head has its instances"):
                first.submit(words=1, voice="b")
    finally:
        first.close(cancel=True)


@pytest.mark.parametrize("before", [False, True])
def test_of_two_heads_that_begin_at_the_same_moment_one_has_the_instances(nodes, monkeypatch, before):
    """Both have heard the same of the one before when they take their epochs."""
    leave, name = joined(nodes), "lasting" if before else "both"
    pids = held(nodes, 60.0) if before else None
    both = threading.Barrier(2)

    def taken(known, holder):
        both.wait(60)
        return next_epoch(known, holder)

    monkeypatch.setattr(machines, "next_epoch", taken)
    fates = {}

    def begin(number):
        try:
            fates[number] = Cluster(made.chat, instances=2, address=nodes, name=name)
        except BackendError as error:
            fates[number] = error

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clusters = [one for one in fates.values() if isinstance(one, Cluster)]
    first = max(clusters, key=lambda one: one._machines.epoch)
    for error in fates.values():
        assert isinstance(error, Cluster) or "another process is the head" in str(error)
    answer = first.submit(words=500, voice="a", id="a")
    assert said(answer) == [f"a{n}" for n in range(1, 501)] and not first.counts.restarted
    assert before is False or sorted(first.pids.values()) == sorted(pids)
    for second in clusters:
        if second is not first:
            with pytest.raises((RequestError, RequestFailed), match=r"another (process is the head|head has its)"):
                second.submit(words=1, voice="b").result(60)
            second.close()
    assert said(first.submit(words=2, voice="c")) == ["c1", "c2"], "who lost ends nobody's instances"
    pids = list(first.pids.values())
    first.close()
    assert gone(pids)
    leave()


HANGING = (
    "import sys, made; from neustream.backends.ray import Cluster, cluster; of = cluster.machines_of; "
    "cluster.machines_of = lambda *args, **how: of(*args, **{**how, 'start_s': float(sys.argv[4])}); "
    "make = made.Hangs(sys.argv[2], alone=sys.argv[5] == 'alone'); "
    "Cluster(make, address=sys.argv[1], name='hanging', lease_s=float(sys.argv[3]))"
)


@pytest.mark.parametrize(
    ("lease_s", "start_s", "how"),
    [pytest.param(1, 600, "sleeps", id="its lease"), pytest.param(600, 2, "alone", id="its time to start")],
)
def test_an_instance_whose_make_hangs_ends_although_its_head_is_gone(nodes, tmp_path, lease_s, start_s, how):
    path = tmp_path / "pid"
    arguments = [sys.executable, "-c", HANGING, nodes, str(path), str(lease_s), str(start_s), how]
    holder = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until = stopwatch() + 120
        while not path.exists():
            assert stopwatch() < until and holder.poll() is None
            time.sleep(0.05)
    finally:
        holder.kill()
        holder.communicate()
    assert gone([int(path.read_text())])


def test_a_make_that_does_not_return_in_time_is_told_with_its_machine(nodes, tmp_path, monkeypatch):
    machines_of = cluster_module.machines_of
    monkeypatch.setattr(
        cluster_module, "machines_of", lambda *args, **how: machines_of(*args, **{**how, "start_s": 2.0})
    )
    path = tmp_path / "pid"
    with pytest.raises(BackendError, match=r"instance 'whole-1' on .* \(cpu\): make did not return in 2 s"):
        Cluster(made.Hangs(str(path)), address=nodes)
    assert gone([int(path.read_text())])
