"""Profiles of four dialects: what is read of them, what is refused by name, what is wrong."""

from __future__ import annotations

import math

import pytest
from profile_files import ALL, FLAT, GUIDE, NOP, PERF, URL, VLLM, bare, changed, read, write  # noqa: F401

from neustream.bench.profiles import Unrunnable, read_profile
from neustream.bench.profiles.telling import lines, told
from neustream.errors import ConfigError
from neustream.workload.texts import Texts

pytestmark = pytest.mark.usefixtures("bare")


def loads(profile):
    """Law, requests, rate, concurrency and duration of each load."""
    return [(x.law, x.requests, x.rate, x.concurrency, x.duration_s) for x in profile.played_first]


# -- tokens, overrides, dialects ---------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ALL)
def test_a_profile_is_read_by_its_keys_and_lacks_what_no_token_stands_for(tmp_path, dialect):
    profile = read(tmp_path, ALL[dialect])
    assert profile.dialect == dialect and profile.target.url == "" and profile.target.model == ""
    assert "--base-url" in profile.lacks[0]
    text = "\n".join(lines(profile, Texts()))
    assert "needed before a run" in text and told(profile, Texts())["dialect"] == dialect


@pytest.mark.parametrize("dialect", ALL)
def test_tokens_stand_for_options_before_environment_variables(tmp_path, dialect, monkeypatch):
    monkeypatch.setenv("LLMDBENCH_DEPLOY_CURRENT_MODEL", "theirs")
    monkeypatch.setenv("LLMDBENCH_HARNESS_STACK_ENDPOINT_URL", "http://there:1/v1/")
    if dialect != "nop":  # it names no server
        profile = read(tmp_path, ALL[dialect])
        assert (profile.target.model, profile.target.url) == ("theirs", "http://there:1")
        assert profile.tokenizer == "theirs"
    profile = read(tmp_path, ALL[dialect], model="ours", url="http://here:2")
    assert (profile.target.model, profile.target.url, profile.lacks) == ("ours", "http://here:2", ())


def test_a_route_may_stand_behind_the_token_of_a_url(tmp_path):
    profile = read(tmp_path, changed(PERF, server__base_url=f"{PERF['server']['base_url']}/v1"))
    assert profile.target.url == "" and "--base-url" in profile.lacks[0]
    with pytest.raises(ConfigError, match=r"server.base_url"):
        read(tmp_path, changed(PERF, server__base_url=f"{PERF['server']['base_url']}x"))


def test_another_token_is_an_error_where_its_key_is_used(tmp_path, monkeypatch):
    odd = changed(PERF, data__input_distribution__max="REPLACE_ENV_LONGEST")
    with pytest.raises(ConfigError, match=r"REPLACE_ENV_LONGEST stands for nothing: set .* LONGEST"):
        read(tmp_path, odd)
    with pytest.raises(ConfigError, match=r"api.headers.x: REPLACE_ENV_KEY stands for nothing"):
        read(tmp_path, changed(PERF, api__headers={"x": "a REPLACE_ENV_KEY b"}))
    monkeypatch.setenv("LONGEST", "11")
    assert read(tmp_path, odd).source.inputs.most == 11
    assert [each.key for each in read(tmp_path, NOP).left] == ["pvc_name"]  # its token is no error


def test_overrides_are_paths_with_numbers_for_entries(tmp_path):
    profile = read(tmp_path, PERF, "load.stages.0.rate=3,load.stages[1].duration=2", "api.type=chat")
    assert [load.requests for load in profile.loads] == [3, 80] and profile.target.api == "chat"
    assert read(tmp_path, VLLM, "num-prompts=9").loads[0].requests == 9
    many = changed(GUIDE, benchmarks=[{"profile.streams": 1}, {"profile.streams": 2}])
    assert [x.concurrency for x in read(tmp_path, many, "benchmarks.1.profile.streams=5").loads] == [1, 5]
    listed = read(tmp_path, FLAT, "rate=[4,5],max_seconds=2")
    assert [(load.rate, load.duration_s) for load in listed.loads] == [(4, 2), (5, 2)]
    odd = changed(PERF, data__input_distribution__std=3)
    assert read(tmp_path, odd, "data.input_distribution.std=null").source.inputs.std == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("load.stagse.0.rate=1", "no section 'stagse'; did you mean 'stages'"),
        ("load.stages.7.rate=1", "'7' is no entry of that list; allowed: 0 to 1"),
        ("load.type.x=1", "no section 'type'"),
        ("load", "expected path=value"),
        ("=1", "expected path=value"),
        ("load.ratte=1", "unknown key 'load.ratte'"),
        ("load.stages.0.rate=[", "line 1"),
    ],
)
def test_an_override_that_leads_nowhere_is_an_error(tmp_path, override, says):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, PERF, override)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x/a.yaml", {"isl": 1, "osl": 2, "endpoint-type": "chat", "request-count": 5}, "aiperf is not run"),
        ("x/a.yaml", {"trafficClasses": [], "load": {}, "api": {}}, "priority-mix is not run"),
        ("x/a.yaml", {"tasks": ["a"], "model_args": {}}, "lm-eval is not run"),
        ("inferencemax/a.yaml", VLLM, "inferencemax is not run"),
        ("eval-containers/a.yaml", {"x": 1}, "eval-containers is not run"),
    ],
)
def test_profiles_of_other_tools_are_known_and_not_run(tmp_path, name, content, says):
    path = tmp_path / name
    path.parent.mkdir()
    with pytest.raises(Unrunnable, match=says):
        read_profile(write(path.parent, content, path.name))


def test_the_tool_can_be_named(tmp_path):
    folder = tmp_path / "inferencemax"
    folder.mkdir()
    assert read(folder, VLLM, harness="vllm-benchmark").dialect == "vllm-benchmark"
    with pytest.raises(ConfigError, match=r"'vllm-bench'.*did you mean 'vllm-benchmark'"):
        read(tmp_path, VLLM, harness="vllm-bench")
    with pytest.raises(Unrunnable, match="aiperf is not run"):
        read(tmp_path, VLLM, harness="aiperf")
    with pytest.raises(ConfigError, match=r"no profile .* known by its keys \(x, y\)"):
        read(tmp_path, {"x": 1, "y": 2})


# -- what is read of each dialect --------------------------------------------------------------------


def test_inference_perf_loads(tmp_path):
    assert loads(read(tmp_path, PERF)) == [
        ("rescaled", 20, 20, None, 1.0),
        ("rescaled", 40, 40, None, 1.0),
    ]
    poisson = changed(PERF, load__type="poisson", load__num_workers=2, load__worker_max_concurrency=10)
    assert loads(read(tmp_path, poisson))[0] == ("rescaled by second", 20, 20, 20, 1.0)
    stages = [{"num_requests": 5, "concurrency_level": 2}]
    closed = changed(PERF, load__type="concurrent", load__stages=stages)
    assert loads(read(tmp_path, closed)) == [("closed", 5, None, 2, None)]
    swept = read(tmp_path, changed(PERF, load={"sweep": {"type": "linear", "num_requests": 50, "num_stages": 3}}))
    assert loads(swept) == [("rescaled", 50, 10.0, None, 60)] and swept.sweep.count == 3


def test_inference_perf_says_how_requests_are_put(tmp_path):
    profile = read(
        tmp_path,
        changed(
            PERF,
            api__type="chat",
            api__headers={"x-slo-ttft-ms": "200", "x-a": "b"},
            api__response_format={"type": "json_object"},
            server__api_key="secret",
            load__request_timeout=7,
            load__interval=3,
            report__goodput={"constraints": {"ttft": 9, "itl": 0.5, "request_latency": 4}},
        ),
    )
    target = profile.target
    assert (target.api, target.stream, target.ignore_eos, target.timeout_s) == ("chat", True, True, 7)
    assert target.headers == {"x-slo-ttft-ms": "200", "x-a": "b", "Authorization": "Bearer secret"}
    assert target.body == {"response_format": {"type": "json_object"}}
    assert (profile.limits.ttft_s, profile.limits.e2e_s, profile.limits.tpot_s) == (0.2, 4, math.inf)
    assert profile.constraints == {"itl": 0.5} and profile.pause_s == 3
    assert "secret" not in str(told(profile, Texts()))


def test_what_changes_nothing_is_listed(tmp_path):
    profile = read(
        tmp_path,
        changed(
            PERF,
            metrics={"type": "prometheus", "prometheus": {"url": "http://p:9090"}},
            report__prometheus={"summary": True},
            tokenizer__token="x",
            load__worker_max_tcp_connections=5,
            load__worker_max_concurrency=50,
            load__trace={"file": "x"},
            data__shared_prefix={},
            report__request_lifecycle={"percentiles": [50]},
        ),
    )
    assert {each.key for each in profile.left} == {
        "metrics",
        "report.prometheus.summary",
        "tokenizer.token",
        "load.worker_max_tcp_connections",
        "load.worker_max_concurrency",
        "storage.local_storage",
        "load.trace",
        "data.shared_prefix",
        "data.input_distribution.total_count",
        "report.request_lifecycle.percentiles",
    }
    assert "ignored: metrics: a Prometheus server is not asked" in "\n".join(lines(profile, Texts()))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"kind": "synchronous"}, [("closed", 6, None, 1, None)]),
        ({"kind": "concurrent", "streams": [1, 4]}, [("closed", 6, None, 1, None), ("closed", 6, None, 4, None)]),
        ({"kind": "throughput", "max_concurrency": 9}, [("closed", 6, None, 9, None)]),
        ({"kind": "constant", "rate": 2}, [("even", 6, 2, None, None)]),
        ({"kind": "async", "rate": "[1, 2]"}, [("even", 6, 1, None, None), ("even", 6, 2, None, None)]),
        ({"kind": "poisson", "rate": [2.5], "max_concurrency": 3}, [("poisson", 6, 2.5, 3, None)]),
        (
            {"kind": "sweep", "sweep_size": 5, "max_concurrency": 7},
            [("closed", 6, None, 1, None), ("closed", 6, None, 7, None)],
        ),
    ],
    ids=lambda each: each["kind"] if isinstance(each, dict) else "",
)
def test_guidellm_loads(tmp_path, kind, expected):
    profile = read(tmp_path, changed(GUIDE, spec__profile=kind))
    assert loads(profile) == expected
    assert (profile.sweep is not None) == (kind["kind"] == "sweep")


def test_guidellm_benchmarks_change_the_loads_of_a_scenario(tmp_path):
    scenario = changed(
        GUIDE,
        spec__profile={"kind": "concurrent"},
        spec__constraints=[{"kind": "max_requests"}, {"kind": "max_duration", "seconds": 9}],
        benchmarks=[
            {"profile.streams": 3, "constraints[0].count": 30},
            {"profile.streams": 6},
            {"profile.streams": 9, "constraints[0].count": 90},
        ],
    )
    # what the first one says is of the scenario too
    assert loads(read(tmp_path, scenario)) == [
        ("closed", 30, None, 3, 9),
        ("closed", 30, None, 6, 9),
        ("closed", 90, None, 9, 9),
    ]


@pytest.mark.parametrize("benchmarks", [None, [], [None], [{}]])
def test_guidellm_benchmarks_that_change_nothing_are_one(tmp_path, benchmarks):
    assert loads(read(tmp_path, changed(GUIDE, benchmarks=benchmarks))) == loads(read(tmp_path, GUIDE))


@pytest.mark.parametrize("benchmarks", [False, 0, "", {}])
def test_guidellm_benchmarks_that_are_no_list_are_named(tmp_path, benchmarks):
    with pytest.raises(ConfigError, match="benchmarks"):
        read(tmp_path, changed(GUIDE, benchmarks=benchmarks))


def test_guidellm_data(tmp_path):
    data = {
        "kind": "synthetic_text",
        "prompt_tokens": 50,
        "prompt_tokens_stdev": 5,
        "output_tokens": 9,
        "output_tokens_min": 3,
        "turns": 4,
        "prefix_buckets": [{"prefix_tokens": 100, "prefix_count": 2}, {"prefix_tokens": 0}],
        "delay": 0.5,
    }
    source = read(tmp_path, changed(GUIDE, spec__data=[data], spec__seed={"value": 7})).source
    assert (source.inputs.kind, source.inputs.least, source.inputs.most) == ("normal", 25, 75)
    assert (source.outputs.kind, source.outputs.least, source.outputs.most) == ("uniform", 3, 9)
    assert [(each.count, each.tokens) for each in source.prefixes] == [(2, 100), (1, 0)]
    assert source.turns == 4 and source.think.mean == 500


def test_guidellm_flat_scenarios_are_read_too(tmp_path):
    profile = read(tmp_path, FLAT)
    assert loads(profile) == [("even", None, 1, None, 3), ("even", None, 2, None, 3)]
    assert profile.target.api == "completions" and str(profile.source).startswith("random texts of 8 tokens")
    dict_form = {**FLAT, "data": {"prompt_tokens": 8, "output_tokens": 4}, "profile": "concurrent"}
    assert loads(read(tmp_path, dict_form)) == [("closed", None, None, 1, 3), ("closed", None, None, 2, 3)]
    assert read(tmp_path, changed(FLAT, data='{"prompt_tokens": 8}')).source.outputs is None


def test_vllm_flags(tmp_path):
    profile = read(
        tmp_path,
        changed(
            VLLM,
            **{
                "request-rate": 4,
                "burstiness": 4,
                "goodput": "ttft:200 e2el:4000",
                "header": "a=b c=d=e",
                "temperature": 0.5,
                "extra-body": '{"top_k": 3}',
                "random-range-ratio": '{"input": 0.5, "output": 0}',
                "num-warmups": 2,
            },
        ),
    )
    (load,) = profile.loads
    assert (load.law, load.requests, load.rate, load.concurrency, load.cv) == ("rescaled", 6, 4, 2, 0.5)
    assert (profile.limits.ttft_s, profile.limits.e2e_s) == (0.2, 4.0) and profile.warmups == 2
    target = profile.target
    assert target.headers == {"a": "b", "c": "d=e"} and target.ignore_eos
    assert target.body == {"temperature": 0.5, "top_k": 3}
    assert (profile.source.inputs.least, profile.source.inputs.most) == (4, 12)
    assert {each.key for each in profile.left} == {"executable", "percentile-metrics"}
    closed = read(tmp_path, VLLM)
    assert loads(closed) == [("closed", 6, None, 2, None)] and closed.target.stream
    at_once = read(tmp_path, changed(VLLM, **{"max-concurrency": ..., "request-rate": "inf"}))
    assert loads(at_once) == [("at once", 6, None, None, None)]
    here = changed(VLLM, **{"base-url": ..., "host": "h", "port": 9})
    assert read(tmp_path, here).target.url == "http://h:9"


def test_what_a_server_is_asked_is_told(tmp_path):
    text = "\n".join(lines(read(tmp_path, changed(PERF, server__model_name="m"), url="http://x:1"), Texts()))
    assert "asks http://x:1, m: completions, streamed, exactly as long as asked" in text
    assert "in all: 2 stages, 60 requests, at least 3 s" in text
    assert URL not in text
