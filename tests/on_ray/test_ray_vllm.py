"""vLLM engines as instances of a cluster on two nodes of a real Ray: a text that moves, and a death."""

from __future__ import annotations

import os
import signal

import pytest

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
if not hasattr(ray, "init"):
    pytest.skip("needs the extra 'ray'", allow_module_level=True)
pytest.importorskip("vllm.engine.arg_utils", reason="needs vLLM beside Ray: `make test-vllm` has both")

import made  # noqa: E402
from asking import adds_up, gone  # noqa: E402

from neustream.backends.ray import Cluster  # noqa: E402
from neustream.cluster.book import Settings  # noqa: E402
from neustream.cluster.happenings import Lost  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.vllm]
PATIENT = Settings(suspect_s=60.0, dead_s=90.0, send_s=60.0, patience_s=300.0)
PROMPTS = [[4 + (7 * at + 13 * number) % 400 for at in range(20 + number)] for number in range(6)]
MOST = {"max_tokens": 200, "ignore_eos": True, "model": "chat"}


def test_texts_move_between_engines_and_outlive_one(nodes, tmp_path):
    make = made.OfVLLM(str(made.opt(tmp_path / "opt")))
    events = []
    with Cluster(make, instances=2, address=nodes, settings=PATIENT, watchers=[events.append]) as cluster:
        whole = [cluster.submit(prompt, **MOST).result(300).token_ids for prompt in PROMPTS]
        assert not [event for event in events if isinstance(event, Lost)]
        answer = cluster.submit(PROMPTS[0], **MOST, id="m")
        reading = iter(answer)
        next(reading)
        source = answer.outputs[0].member
        [target] = cluster.instances.keys() - {source}
        cluster.move("m", target)
        assert [answer.outputs[0].update["item"].id, *[token.id for token in reading]] == list(whole[0])
        assert cluster.counts.moved == 1 and {output.member for output in answer.outputs} == {source, target}
        sampled = cluster.submit(PROMPTS[1], **MOST, temperature=1.0, seed=3, id="s")
        next(iter(sampled))
        [target] = cluster.instances.keys() - {sampled.outputs[0].member}
        cluster.move("s", target)
        assert len(sampled.result(300).token_ids) == 200
        assert cluster.counts.unmoved == 1 and len({output.member for output in sampled.outputs}) == 1
        answers = [cluster.submit(prompt, **MOST) for prompt in PROMPTS]
        next(iter(answers[0]))
        pids = dict(cluster.pids)
        os.kill(pids[answers[0].outputs[0].member], signal.SIGKILL)
        assert [answer.result(300).token_ids for answer in answers] == whole
        assert cluster.counts.lost == 1 and cluster.counts.failed == 0 and adds_up(cluster)
        pids = [*pids.values(), *cluster.pids.values()]
    assert gone(pids)
