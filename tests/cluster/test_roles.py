"""Roles: kinds of instances that serve some stages of a model, or some of several models."""

from __future__ import annotations

import pytest
from clusters import head_of, request

from neustream import SLO, ConfigError
from neustream.cluster import messages as say
from neustream.cluster.book import Settings
from neustream.config import load_config
from neustream.engine.events import Started
from neustream.experiment.prepared import prepare
from neustream.experiment.running import simulate

IMAGES = """
name: split
profiles: {root}/profiles/h100/sd15_512
stages: {{clip: {{max_batch: 10}}, unet: {{times: steps, max_batch: 15}}, vae: {{profile: [vae, safety]}}}}
workload: {{rate: 3, requests: 30, steps: {{min: 5, max: 10}}}}
slo: {{scale: 6}}
cluster:
  instances:
    front: {{count: 1, stages: [clip, vae]}}
    core: {{count: 2, stages: [unet]}}
"""
TEXTS = """
name: chat
profiles: {root}/profiles/a6000/opt_13b
llm: {{max_batch: 8, memory: {{tokens: 640, block: 16}}}}
workload: {{rate: 8, requests: 40, prompt: 60, output: {{min: 20, max: 60}}, max_tokens: 60}}
slo: {{first_s: 5, step_s: 1}}
cluster:
  instances:
    prefill: {{count: 1, stages: [llm.prefill]}}
    decode: {{count: 1, stages: [llm.decode]}}
  network: {{token_bytes: 819200}}
"""
BOTH = """
name: both
models:
  image:
    profiles: {root}/profiles/h100/sd15_512
    stages: {{clip: {{max_batch: 10}}, unet: {{times: steps, max_batch: 15}}, vae: {{profile: [vae, safety]}}}}
    workload: {{rate: 3, requests: 20, steps: 5}}
    slo: {{scale: 6}}
  chat:
    profiles: {root}/profiles/a6000/opt_13b
    llm: {{}}
    workload: {{rate: 8, requests: 20, prompt: 60, output: 10, max_tokens: 60}}
    slo: {{first_s: 5, step_s: 1}}
simulation: {{mixed_devices: true}}
cluster:
  instances:
    images: {{count: 1, stages: [image]}}
    all: {{count: 1}}
"""


@pytest.fixture
def file(tmp_path, root):
    def write(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text.format(root=root))
        return path

    return write


class Steps:
    """An observer: which stages ran where."""

    def __init__(self) -> None:
        self.at: dict[str, set[str]] = {}

    def __call__(self, record) -> None:
        if isinstance(record, Started):
            self.at.setdefault(record.member, set()).add(record.step.stage)


def run(path, *changes: str, policy: str = "priced") -> tuple[dict, Steps]:
    steps = Steps()
    return simulate(prepare(load_config(path, changes)), policy, [steps]).to_dict(), steps


def test_each_stage_runs_where_it_is_served(file):
    told, steps = run(file(IMAGES))
    assert told["counts"]["on_time"] == 30
    assert steps.at == {"front-0": {"clip", "vae"}, "core-1": {"unet"}, "core-2": {"unet"}}
    assert told["cluster"]["moves"] == {"stage unet": 30, "stage vae": 30}


def test_state_takes_time_on_its_way(file):
    light, _ = run(file(IMAGES))
    heavy, _ = run(file(IMAGES), "cluster.network.state_bytes=3e7", "cluster.network.bandwidth=3e8")
    gained = heavy["cluster"]["downtime_s"]["p50"] - light["cluster"]["downtime_s"]["p50"]
    assert gained == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("policy", ["priced", "fcfs", "sarathi", "neustream_llm"])
def test_texts_decode_elsewhere_and_go_back_when_their_blocks_are_taken(file, policy):
    told, steps = run(file(TEXTS), policy=policy)
    assert told["counts"]["failed"] == 0
    assert steps.at == {"prefill-0": {"llm.prefill"}, "decode-1": {"llm.decode"}}
    moves = told["cluster"]["moves"]
    assert moves["stage llm.prefill"] and moves["stage llm.decode"] > 40


@pytest.mark.parametrize("policy", ["priced", "fcfs", "edf"])
def test_texts_of_a_decoder_that_died_are_prefilled_again_behind_what_they_said(file, policy):
    words = ["cluster.instances.decode.count=2", "cluster.faults=[{at_s: 2, instance: 1, kind: crash}]"]
    report = simulate(prepare(load_config(file(TEXTS), [*words, "slo=null"])), policy)
    assert sum(report.restarts.values()) >= 1
    assert report.counts["on_time"] == 40


def test_instances_serve_several_models_or_one_of_them(file):
    told, steps = run(file(BOTH))
    assert told["counts"]["on_time"] == 40
    assert steps.at["images-0"] <= {"image.clip", "image.unet", "image.vae"}
    assert steps.at["all-1"] >= {"chat.llm.prefill", "chat.llm.decode"}


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (IMAGES, "cluster.instances.core.stages=[unett]", r"cluster.instances.core.stages: no stage 'unett'"),
        (IMAGES, "cluster.instances.front.stages=[clip]", r"cluster.instances: nobody serves stage 'vae'"),
        (IMAGES, "cluster.instances.front.count=0", r"cluster.instances: nobody serves stage 'clip'"),
        (TEXTS, "cluster.network.token_bytes=0", r"prefill.stages: llm.prefill without its other phase: give"),
        (BOTH, "cluster.instances.all.profiles=/x", r"all.profiles: there are several models; give a folder of each"),
        (BOTH, "cluster.instances.all.profiles={chat: /x}", r"all.profiles: no folder of model 'image'"),
    ],
)
def test_roles_that_cannot_serve_are_refused(file, text, change, message):
    with pytest.raises(ConfigError, match=message):
        run(file(text), change)


@pytest.mark.parametrize(("slo", "end"), [(SLO(), 7.0), (SLO(total=9.0), 9.0), (SLO(total=1.0), 7.0)])
def test_one_that_is_never_taken_where_its_next_stage_is_fails_in_the_end(slo, end):
    patient = Settings(suspect_s=90.0, dead_s=90.0, patience_s=7.0)
    head = head_of(settings=patient)
    head.joined("a", 0.0, stages=("step",))
    head.joined("b", 0.0, stages=("decode",))
    head.submit(request("r", slo=slo), 0.0)
    head.heard("a", say.Took("r", 1), 0.0)
    head.heard("a", say.Waits("r", 1, away="decode"), 0.0)
    now, asked, orders = 0.0, 0, head.pop_orders()
    while not (orders and isinstance(orders[-1], say.Answer)) and asked < 500:
        for order in orders:
            if isinstance(order, say.Reserve):
                asked += 1
                head.heard("b", say.Refused("r", order.term, "no room"), now)
        now = head.wake_at()
        head.tick(now)
        orders = head.pop_orders()
    assert orders[-2] == say.Free("a", "r", 1) and asked > 20
    ended = orders[-1].ended
    assert (ended.status, ended.reason) == ("failed", "nobody takes it for stage 'decode': no room")
    assert end < now < end + 0.3
