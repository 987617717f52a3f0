"""Roles on two nodes of a real Ray: prefill | decode, encode | denoise | decode, and one of them killed."""

from __future__ import annotations

import os
import signal

import pytest

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
if not hasattr(ray, "init"):
    pytest.skip("needs the extra 'ray'", allow_module_level=True)

import made  # noqa: E402
from asking import adds_up, gone  # noqa: E402

from neustream.backends.ray import Cluster, Kind  # noqa: E402
from neustream.cluster.book import Settings  # noqa: E402
from neustream.cluster.happenings import Moved  # noqa: E402

pytestmark = pytest.mark.ray


def test_each_stage_is_served_by_its_role_and_nothing_comes_out_different(nodes):
    import torch
    from pipelines import requests, tensor_of
    from texts import prompts

    request, some = requests("stable_diffusion")[0], prompts(8)
    asked = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    with made.models("cpu") as alone:
        texts = [alone.submit(one, model="chat", **asked).result(60).token_ids for one in some]
        image = tensor_of(alone.submit(**request.arguments(), model="sd").result(60))
    events = []
    kinds = {name: Kind(made.Role(name)) for name in made.ROLES}
    patient = Settings(suspect_s=60.0, dead_s=90.0, patience_s=300.0)  # libraries are imported meanwhile
    with Cluster(kinds, address=nodes, watchers=[events.append], settings=patient) as cluster:
        picture = cluster.submit(**request.arguments(), model="sd", id="image")
        answers = [cluster.submit(one, model="chat", **asked) for one in some]
        assert [answer.result(120).token_ids for answer in answers] == texts
        assert [[one.index for one in answer.outputs] for answer in answers] == [list(range(12))] * len(some)
        assert torch.equal(tensor_of(picture.result(120)), image)
        moves = [event.reason.partition("@")[0] for event in events if isinstance(event, Moved)]
        assert moves.count("stage chat.decode") >= len(some)
        assert moves.count("stage sd/denoise") == moves.count("stage sd/decode") == 1
        pids = dict(zip(cluster.instances, cluster.pids.values(), strict=True))
        again = [cluster.submit(one, model="chat", **asked) for one in some]
        next(iter(again[0]))
        [back] = [name for name in pids if name.startswith("back")]
        os.kill(cluster.pids[back], signal.SIGKILL)
        assert [answer.result(300).token_ids for answer in again] == texts
        assert [[one.index for one in answer.outputs] for answer in again] == [list(range(12))] * len(some)
        assert cluster.counts.lost == 1 and cluster.counts.failed == 0 and adds_up(cluster)
        pids = [*pids.values(), *cluster.pids.values()]
    assert gone(pids)
