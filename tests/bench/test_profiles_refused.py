"""Profiles that are wrong or not run: each is told in a line that names the key."""

from __future__ import annotations

import pytest
from profile_files import FLAT, GUIDE, NOP, PERF, VLLM, bare, changed, read, write  # noqa: F401

from neustream.bench.profiles import Unrunnable, read_profile
from neustream.errors import ConfigError

pytestmark = pytest.mark.usefixtures("bare")

# -- wrong -------------------------------------------------------------------------------------------

WRONG = [
    ("", "expected a mapping"),
    ("[1, 2]", "expected a mapping"),
    ("load: [", "line 1"),
    ("load: {}\nload: {}", "given twice"),
    (changed(PERF, lod=1), "unknown key 'lod'; did you mean 'load'"),
    (
        changed(PERF, data__input_distribution__std=5),
        "unknown key 'data.input_distribution.std'; did you mean 'std_dev'",
    ),
    (changed(PERF, load__stages__0__rate=0), "load.stages.0.rate: Input should be greater than 0, got 0"),
    (changed(PERF, load__stages__0__rate="x"), "load.stages.0.rate"),
    (changed(PERF, load__stages__0__num_requests=5), "load.stages.0.num_requests"),
    (changed(PERF, load__stages__0__rate=...), "key 'load.stages.0.rate' is needed"),
    (changed(PERF, load__stages__0__rate=0.1), "0.1 requests/s for 1 s are no request"),
    (changed(PERF, load__stages=[]), "load.stages: there are none"),
    (
        changed(PERF, load__lora_traffic_split=[{"name": "a", "split": 0.5}, {"name": "b", "split": 0.4}]),
        "load.lora_traffic_split: the splits are 0.9 together; expected 1",
    ),
    (changed(PERF, load__type="konstant"), "load.type"),
    (changed(PERF, load__type="concurrent"), "'load.stages.0.concurrency_level' is needed"),
    (changed(PERF, load__stages__0__rate=1e7, load__stages__0__duration=1000), "more than 2,000,000 requests"),
    (changed(PERF, data__input_distribution__mean=99), "mean: 99 is not between min 4 and max 12"),
    (changed(PERF, data__input_distribution__min=99), "min 99 is greater than max 12"),
    (changed(PERF, data__input_distribution__variance=4), "std_dev and variance are both given"),
    (changed(PERF, data__input_distribution=...), "needs input_distribution and output_distribution"),
    (changed(PERF, data__type="shared_prefix"), "needs data.shared_prefix"),
    (changed(PERF, data__type="conversation_replay"), "needs data.conversation_replay"),
    (changed(PERF, api__headers={"x-slo-ttft-ms": "soon"}), "expected a number above 0, got 'soon'"),
    (changed(PERF, data__multimodal={"image": {"cuont": {"mean": 1}}}), "unknown key 'data.multimodal.image.cuont'"),
    (changed(PERF, load__trace={"fiel": "x"}), "unknown key 'load.trace.fiel'"),
    (changed(PERF, data={"shared_prefix": {"question_len": {"std": 1}}}), "'data.shared_prefix.question_len.std'"),
    (changed(PERF, data={"shared_prefix": {"question_len": "x"}}), "data.shared_prefix.question_len: Input should be"),
    (changed(PERF, server__base_url="ftp://x"), "server.base_url: 'ftp://x' is no URL"),
    (changed(PERF, report__goodput={"constraints": {"e2e": 1}}), "report.goodput.constraints"),
    (changed(GUIDE, spec__profile__streams=...), "'spec.profile.streams' is needed"),
    (changed(GUIDE, spec__profile__stream=1), "unknown key 'spec.profile.stream'; did you mean 'streams'"),
    (
        changed(GUIDE, spec__profile__rate=1),
        "unknown key 'spec.profile.rate'; allowed: cooldown, kind, rampup_duration, streams, warmup",
    ),
    (changed(GUIDE, spec__profile__kind="spiral"), "profile.kind"),
    (changed(GUIDE, spec__data__0__prompt_tokens_min=9), "the least (9) is greater than the most (8)"),
    (changed(GUIDE, spec__data__0__prompt_tokns=9), "unknown key 'spec.data.0.prompt_tokns'"),
    (changed(GUIDE, spec__constraints__0__count=[1, 2, 3]), "3 values for 1 loads"),
    (changed(GUIDE, benchmarks=[{"constraints[5].count": 1}]), "'5' is no entry of that list"),
    (changed(FLAT, data=...), "data: is needed"),
    (changed(FLAT, request_type="audio"), "request_type: 'audio' is not spoken"),
    (changed(FLAT, max_second=1), "unknown key 'max_second'; did you mean 'max_seconds'"),
    (changed(VLLM, **{"num-promts": 3}), "unknown key 'num_promts'; did you mean 'num_prompts'"),
    (changed(VLLM, **{"num-prompts": 0}), "num_prompts"),
    (changed(VLLM, goodput="ttft:soon"), "goodput: 'ttft:soon'; allowed"),
    (changed(VLLM, header="nothing"), "header: 'nothing' is not KEY=VALUE"),
    (changed(VLLM, **{"random-input-len": 0}), "prompts would be empty"),
    (changed(VLLM, **{"dataset-name": "prefix_repetition"}), "num-prompts: 6 are fewer than the 10 prefixes"),
    (changed(VLLM, backend="openai-chat", endpoint="/v1/completions"), "no route of chats"),
    (changed(NOP, model_nam="x"), "unknown key 'model_nam'; did you mean 'model_name'"),
]


@pytest.mark.parametrize(("profile", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_wrong_is_told_with_its_key(tmp_path, profile, says):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, profile)
    text = str(error.value)
    assert says in text and text.startswith(str(tmp_path)) and "\n" not in text


def test_the_line_of_a_key_is_told(tmp_path):
    path = write(tmp_path, "load:\n  type: constant\n  stages:\n  - rate: 1\n    duraton: 3\n")
    with pytest.raises(ConfigError, match=r"line 5: unknown key 'load.stages.0.duraton'"):
        read_profile(path)


def test_unknown_keys_can_be_left_out_and_are_told(tmp_path):
    odd = changed(PERF, lod=1, data__input_distribution__std=5)
    profile = read(tmp_path, odd, lenient=True)
    left = {each.key for each in profile.left}
    assert {"lod", "data.input_distribution.std"} <= left
    wrong = changed(odd, load__type="konstant")
    with pytest.raises(ConfigError, match=r"load.type"):
        read(tmp_path, wrong, lenient=True)
    assert "profile.foo" in str(
        [x.key for x in read(tmp_path, changed(GUIDE, spec__profile__foo=1), lenient=True).left]
    )


# -- refused -----------------------------------------------------------------------------------------

REFUSED = [
    (changed(PERF, data__type="shareGPT"), "data.path: .* give a local file"),
    (changed(PERF, data__type="shareGPT", data__path="/no/file.json"), "data.path: '/no/file.json' is no local file"),
    (changed(PERF, data__type="cnn_dailymail"), "data.type: cnn_dailymail needs a data set of the Hugging Face hub"),
    (changed(PERF, data__type="otel_trace_replay"), "data.type: otel_trace_replay"),
    (
        changed(PERF, load={"type": "trace_session_replay", "stages": [{"concurrent_sessions": 1}]}),
        "load.type: sessions",
    ),
    (changed(PERF, load={"type": "trace_replay", "trace": {"file": "x"}}), "load.type: .* replays traces"),
    (changed(PERF, load__circuit_breakers=["a"]), "load.circuit_breakers: a run is not ended"),
    (changed(PERF, data__multimodal={"image": {}}), "data.multimodal: prompts are texts alone"),
    (
        changed(PERF, storage__google_cloud_storage={"bucket_name": "b"}),
        "storage.google_cloud_storage: .* not to a bucket",
    ),
    (changed(PERF, api__type="anthropic_messages"), "api.type: the route /v1/messages is not spoken"),
    (changed(PERF, server__type="mock"), "server.type: mock asks no server"),
    (changed(PERF, server__cert_path="x"), "server.cert_path: no client certificate"),
    (changed(GUIDE, spec__constraints=[]), "spec.constraints: nothing ends the load"),
    (changed(FLAT, max_seconds=...), r"yaml: constraints: nothing ends the load"),
    (
        changed(GUIDE, spec__profile__rampup_duration=3),
        "spec.profile.rampup_duration: places of the kind concurrent are all there",
    ),
    (changed(GUIDE, spec__constraints=[{"kind": "over_saturation"}]), "constraints.0.kind: .* falls behind"),
    (changed(GUIDE, spec__profile={"kind": "goodput"}), "profile.kind: `neustream bench search`"),
    (changed(GUIDE, spec__profile__warmup=0.1), "profile.warmup: a report is of all requests"),
    (changed(GUIDE, spec__data=[{"kind": "huggingface", "source": "a/b"}]), "data.0.source: 'a/b' is no local file"),
    (changed(GUIDE, spec__data=[{"kind": "synthetic_image"}]), "synthetic_image: prompts are texts alone"),
    (changed(GUIDE, spec__data=[{"kind": "parquet_file", "path": "x"}]), "data of kind 'parquet_file' is not read"),
    (changed(GUIDE, spec__data__0__tools=[{}]), "data.0.tools: no tools are called"),
    (changed(GUIDE, spec__backend={"kind": "vllm_python"}), "backend.kind: only servers"),
    (changed(GUIDE, spec__backend__request_format="/v1/responses"), "request_format: /v1/responses is not spoken"),
    (changed(GUIDE, spec__backend__request_format="/pooling"), "request_format: /pooling is not spoken"),
    (changed(GUIDE, benchmarks=[{}, {"data[0].prompt_tokens": 9}]), r"differ in more than their loads \(source\)"),
    (changed(FLAT, data="some/dataset"), "'some/dataset' is no local file"),
    (changed(FLAT, over_saturation=True), "over_saturation: a load is not ended"),
    (changed(VLLM, **{"dataset-name": "sharegpt"}), "dataset-path: dataset-name sharegpt needs a local file"),
    (
        changed(VLLM, **{"dataset-name": "hf", "dataset-path": "a/b"}),
        "dataset-name: hf needs a data set of the Hugging",
    ),
    (changed(VLLM, **{"dataset-name": "random-mm"}), "dataset-name: random-mm: prompts are texts alone"),
    (changed(VLLM, **{"dataset-name": "burstgpt"}), "burstgpt: `neustream bench serve` replays traces"),
    (changed(VLLM, **{"dataset-name": "sonnet"}), "dataset-name: sonnet is not read; allowed: random"),
    (changed(VLLM, backend="vllm-pooling"), "backend: vllm-pooling is not spoken"),
]


@pytest.mark.parametrize(("profile", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_is_not_run_is_refused_by_name(tmp_path, profile, says):
    with pytest.raises(Unrunnable, match=says) as error:
        read(tmp_path, profile)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)
