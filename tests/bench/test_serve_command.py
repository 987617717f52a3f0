"""`neustream bench serve`: flags of vLLM's client, files, exit codes, bad input."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("httptools", reason="needs the extra 'bench'")
from processes import interrupted
from stub import Stub
from toys import command

from neustream.bench import read_runs
from neustream.bench.runs import DETAILS_BYTES, RECORD_BYTES, expected_size
from neustream.commands.bench_data import DataOptions
from neustream.commands.bench_options import PromiseOptions
from neustream.errors import ConfigError
from neustream.workload.asks import Ask

pytestmark = pytest.mark.usefixtures("unhurried")
MAIN = "import sys; sys.argv = ['neustream', *sys.argv[1:]]; from neustream.cli import main; main()"


@pytest.fixture(scope="module")
def stub():
    with Stub(first_s=0.001, gap_s=0.001) as running:
        yield running


def serve(stub, *more, count=6, model="paced"):
    options = ["--num-prompts", count, "--random-input-len", 4, "--random-output-len", 3, "--request-rate", 200]
    return command("bench", "serve", "--base-url", stub.url, "--model", model, *options, *more)


def test_a_run_is_printed_and_written(stub, tmp_path):
    done = serve(
        stub, "--goodput", "ttft:20000", "tpot:20000", "--out", tmp_path / "new", "--json", tmp_path / "j.json"
    )
    assert done.status == 0, done.err
    assert "6 in " in done.out and "100.0 % (61.0 to 100.0)" in done.out and "client: lag" in done.out
    assert max(len(line) for line in done.out.splitlines() if "wrote" not in line) <= 80
    told = json.loads((tmp_path / "j.json").read_text())
    assert (told["completed"], told["total_output_tokens"], told["slo_attainment"]["value"]) == (6, 18, 1.0)
    assert told == json.loads((tmp_path / "new/stage_0.json").read_text())
    ((run,), _) = read_runs(tmp_path / "new")
    assert len(run.records) == 6 and run.records[0].limits.ttft_s == 20.0
    arrivals = [record.scheduled_s for record in run.records]
    assert arrivals == sorted(arrivals) and arrivals[0] > 0


def test_vllms_file_has_its_name_and_keys(stub, tmp_path):
    done = serve(stub, "--save-result", "--save-detailed", "--result-dir", tmp_path, "--metadata", "a=1", "b=2", "-q")
    assert done.status == 0, done.err
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("openai-200.0qps-paced-2")
    told = json.loads(path.read_text())
    assert (told["a"], told["b"], told["num_prompts"], len(told["ttfts"])) == ("1", "2", 6, 6)
    assert told["generated_texts"] == [" w0 w1 w2"] * 6


def test_a_file_that_takes_no_line_is_told_before_anything_is_sent(stub, tmp_path):
    (tmp_path / "all.json").write_bytes(b"\xff\xfe")
    sent = len(stub.log)
    done = serve(stub, "--append-result", "--result-dir", tmp_path, "--result-filename", "all.json")
    assert done.status == 2 and "is no text in UTF-8" in done.err and len(stub.log) == sent
    assert (tmp_path / "all.json").read_bytes() == b"\xff\xfe"


@pytest.mark.parametrize("given", ["true", "null", '"x"', "1" + "0" * 400, "1.5", "-0.1"])
def test_a_share_of_json_that_is_none_is_told(given):
    with pytest.raises(ConfigError, match=r"--random-range-ratio input .*: expected a number from 0 to 1"):
        DataOptions(random_range_ratio=f'{{"input": {given}, "output": 0}}').dataset()


def test_a_burstgpt_trace_asks_for_the_model_that_is_served(stub, tmp_path):
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    (tmp_path / "trace.csv").write_text(f"{head}0.5,ChatGPT,4,3,7,Conversation log\n0.6,GPT-4,5,2,7,API log\n")
    done = command(
        "bench", "serve", "--base-url", stub.url, "--dataset-name", "burstgpt", "--dataset-path", tmp_path / "trace.csv"
    )
    assert done.status == 0, done.err
    assert [each.body["model"] for each in stub.log[-2:]] == ["paced", "paced"]


def test_models_have_names():
    with pytest.raises(ConfigError, match="--lora-modules '': expected names of models"):
        _ = DataOptions(lora_modules=["a", ""]).models


def test_flags_may_be_spelt_as_vllms_parser_takes_them(stub):
    data = ["--num_prompts", 2, "--random_output_len=2", "--random_input_len", 2]
    more = ["--disable_tqdm", "--percentile-metrics", "ttft,tpot", "--header", "a=b", "c=d"]
    done = command("bench", "serve", f"--base_url={stub.url}/v1", *data, *more)
    assert done.status == 0, done.err
    assert stub.log[-1].headers["a"] == "b" and stub.log[-1].headers["c"] == "d"
    assert stub.log[-1].body["model"] == "paced", "the server's first"


def test_a_route_of_images_takes_no_texts(stub):
    done = serve(stub, "--backend", "openai-images")
    assert done.status == 2 and "--backend openai-images: texts are asked for; needs --dataset-name images" in done.err


@pytest.mark.parametrize(
    ("backend", "asked"),
    [("openai", {"logprobs": 2}), ("openai-chat", {"logprobs": True, "top_logprobs": 2})],
)
def test_likelihoods_are_asked_for_as_the_route_has_them(stub, backend, asked):
    done = serve(
        stub, "--endpoint-type", backend, "--logprobs", 2, "--temperature", 0.5, "--skip-tokenizer-init", model="good"
    )
    assert done.status in (0, 4), done.err
    assert stub.log[-1].body.items() >= {**asked, "temperature": 0.5}.items()


def test_a_body_that_asks_for_no_stream_gets_none(stub):
    done = serve(stub, "--extra-body", '{"stream": false}', "--json", "-", model="whole", count=1)
    assert done.status == 0 and json.loads(done.out)["completed"] == 1


def test_results_are_appended_as_lines(stub, tmp_path):
    for count in (2, 3):
        done = serve(stub, "--append-result", "--result-dir", tmp_path, "--result-filename", "all.json", count=count)
        assert done.status == 0, done.err
    lines = (tmp_path / "all.json").read_text().splitlines()
    assert [json.loads(line)["completed"] for line in lines] == [2, 3]


def test_each_request_asks_for_one_of_several_models(stub):
    loras = ["--lora-modules", "paced", "good", "--ignore-eos"]
    done = serve(stub, *loras, "--lora-assignment", "round-robin", "--request-id-prefix", "mine-", count=4)
    assert done.status in (0, 4), done.err
    log = sorted(stub.log[-4:], key=lambda each: each.headers["x-request-id"])
    assert [each.headers["x-request-id"] for each in log] == ["mine-0", "mine-1", "mine-2", "mine-3"]
    assert [each.body["model"] for each in log] == ["paced", "good"] * 2
    serve(stub, *loras, count=30)
    assert {each.body["model"] for each in stub.log[-30:]} == {"paced", "good"}


def test_ratios_of_inputs_and_outputs_differ(stub):
    done = serve(stub, "--random-range-ratio", '{"input": 0, "output": 1}', count=40)
    assert done.status == 0, done.err
    asked = [each.body for each in stub.log[-40:]]
    assert {len(body["prompt"].split()) for body in asked} == {4} and len({body["max_tokens"] for body in asked}) > 3


@pytest.mark.parametrize(("name", "timed"), [("burstgpt", False), ("timed_trace", True)])
def test_vllms_names_of_traces(stub, tmp_path, name, timed):
    """Its client takes BurstGPT's lengths alone, and the arrivals of others."""
    path = tmp_path / "trace.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n0,3,2\n0.5,4,3\n")
    given = ["--dataset-name", name, "--dataset-path", path, "--num-prompts", 2, "--json", "-"]
    for asked in ([], ["--self-timed"], ["--no-self-timed"]):
        done = command("bench", "serve", "--base-url", stub.url, "--model", "paced", *given, *asked)
        assert done.status == 0, done.err
        told = json.loads(done.out)
        assert (told["completed"], told["total_output_tokens"]) == (2, 5)
        assert ("of the trace" in done.err) is (timed if not asked else asked == ["--self-timed"])


def test_flags_of_vllms_client_are_refused_by_name(stub):
    """Those that are not taken, as its `--help=all` has them."""
    flags = "asr-max-audio-len-sec bfcl-categories blazedit-min-distance chat-template-kwargs enable-multimodal-chat"
    flags += " hf-split no-reranker no-stream plot-timeline probe-request-rate profile random-mm-bucket-config"
    flags += " speed-bench-category timed_trace_sec_multiplier use-beam-search"
    for flag in flags.split():
        done = serve(stub, f"--{flag}=1")
        assert done.status == 2 and f"--{flag.replace('_', '-')}: not taken: " in done.err, done.err


def test_metadata_change_no_result(stub):
    assert json.loads(serve(stub, "--metadata", "completed=9", "--json", "-").out)["completed"] == 6


def test_promises_are_told_if_asked_for(stub):
    more = ["--slo-class", "chat:share=1,ttft=200,tpot=50,weight=2", "--slo-class", "batch:share=1,e2e=9000,priority=3"]
    done = serve(stub, *more, "--slo-headers", count=20)
    assert done.status == 0, done.err
    log = stub.log[-20:]
    assert {each.headers["x-slo-class"] for each in log} == {"chat", "batch"}
    for each in log:
        assert each.body.get("priority") == (3 if each.headers["x-slo-class"] == "batch" else None)
    assert "by class" in done.out


def test_a_tokenizer_of_a_hub_is_not_loaded_and_that_is_said(stub):
    done = serve(stub, "--tokenizer", "facebook/opt-125m", count=2)
    assert done.status == 0 and "nothing is loaded from a hub" in done.err


@pytest.mark.parametrize("more", [[], ["--header", "authorization=mine"]])
def test_a_key_of_the_environment_is_sent_unless_another_is_given(stub, monkeypatch, more):
    monkeypatch.delenv("NEUSTREAM_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert serve(stub, *more, count=1).status == 0
    assert stub.log[-1].headers["authorization"] == ("mine" if more else "Bearer secret")


@pytest.mark.parametrize(("asked", "said"), [(4, "1.75 times the tokens"), (7, "")])
def test_prompts_that_are_longer_for_the_server_are_said(stub, asked, said):
    done = serve(stub, "--random-input-len", asked)  # the stub counts 7, whatever there is
    assert done.status == 0 and (said in done.err if said else "times the tokens" not in done.err)


@pytest.mark.parametrize(
    ("more", "said"), [([], "--tokenizer says which"), (["--tokenizer", "bytes"], "than those of --tokenizer bytes")]
)
def test_what_may_make_prompts_longer_is_said_by_what_was_given(stub, more, said):
    done = serve(stub, "--random-input-len", 4, *more)
    assert done.status == 0 and said in done.err


def test_a_warm_up_is_sent_and_not_kept(stub):
    seen = len(stub.log)
    done = serve(stub, "--num-warmups", 3, "--json", "-", count=4)
    assert json.loads(done.out)["completed"] == 4 and len(stub.log) == seen + 7


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--backend", "tgi"], "--backend 'tgi'"),
        (["--dataset-name", "sonet"], "--dataset-name 'sonet'"),
        (["--dataset-name", "sharegpt"], "needs --dataset-path"),
        (["--dataset-name", "custom", "--dataset-path", "/nowhere"], "/nowhere"),
        (["--request-rate", "0"], "--request-rate 0"),
        (["--request-rate", "nan"], "--request-rate nan"),
        (["--burstiness", "-1"], "--burstiness -1"),
        (["--goodput", "ttft"], "--goodput 'ttft': expected NAME:VALUE"),
        (["--goodput", "tftt:3"], "did you mean 'ttft'"),
        (["--goodput", "ttft:0"], "expected a number above 0"),
        (["--slo-class", "a:ttft=x"], "--slo-class a: ttft: expected a number above 0, got 'x'"),
        (["--slo-class", "a:odd=1"], "--slo-class a: odd"),
        (["--slo-class", ":share=1"], "expected NAME"),
        (["--header", "x"], "--header 'x'"),
        (["--header", "a\r\nb=c"], "is none of HTTP"),
        (["--header", "a=b\nc: d"], "is none of HTTP"),
        (["--header", "a=\u0142"], "is none of HTTP"),
        (["--endpoint", "v1/completions"], "expected one that begins with /"),
        (["--endpoint", "/a b"], "without spaces"),
        (["--slo-class", "a", "a:ttft=5"], "--slo-class a: twice"),
        (["--slo-class", "a\nb:ttft=5"], "expected NAME"),
        (["--extra-body", "[1]"], "--extra-body"),
        (["--arrivals", "odd"], "--arrivals 'odd'"),
        (["--tokenizer", "/nowhere"], "/nowhere: no such file"),
        (["--dataset-name", "images", "--image-sizes", "512"], "--image-sizes ''"),
        (["--dataset-name", "images", "--image-steps", "0"], "--image-steps '0'"),
        (["--ramp-up-strategy", "linear"], "needs --ramp-up-start-rps"),
        (["--ramp-up-end-rps", "2"], "--ramp-up-start-rps, --ramp-up-end-rps: need --ramp-up-strategy"),
        (["--base-url", "nowhere"], "expected http"),
        (["--out", "/dev/null/x"], "--out"),
        (["--odd", "1"], "No such option"),
        (["--dataset-name", "hf"], "--dataset-name hf: not read: "),
        (["--lora-modules", "a", "--lora-assignment", "odd"], "--lora-assignment 'odd'"),
        (["--random-range-ratio", "1.5"], "--random-range-ratio '1.5': expected a number from 0 to 1"),
        (["--random-range-ratio", '{"input": 0.5}'], "expected the keys input and output"),
        (["--self-timed"], "--self-timed: there is a rate"),
        (["--tokenizer-mode", "mistral"], "--tokenizer-mode 'mistral'"),
        (["--dataset-name", "custom", "--custom-output-len", "0"], "--custom-output-len 0"),
    ],
)
def test_what_is_wrong_is_named_in_a_line(stub, more, says):
    done = serve(stub, *more)
    assert done.status == 2 and says in done.err, done.err
    assert "Traceback" not in done.err


def test_a_server_that_is_down_is_told_of():
    done = command("bench", "serve", "--port", 9, "--num-prompts", 1)
    assert done.status == 2 and "127.0.0.1:9/v1/models: ConnectionRefusedError" in done.err
    done = command("bench", "serve", "--port", 9, "--model", "m", "--num-prompts", 2, "--json", "-")
    assert done.status == 4 and json.loads(done.out)["failures"] == {"connect": 2}
    assert "no request was done" in done.err


@pytest.mark.parametrize(
    ("model", "kind"), [("html", "not_a_stream"), ("s429", "status_429"), ("error_then_done", "error_event")]
)
def test_failures_are_counted_by_kind(stub, model, kind):
    done = serve(stub, "--json", "-", model=model)
    assert done.status == 4 and json.loads(done.out)["failures"] == {kind: 6}
    assert "first of request 0: " in done.err and "milliseconds" not in done.err


def test_a_server_without_usage_is_said(stub):
    done = command("bench", "serve", "--base-url", stub.url, "--model", "no_usage", "--num-prompts", 2)
    assert done.status == 0 and "tokens counted by chunks" in done.err


FULL = ["--result-dir", "/dev", "--result-filename", "full"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_told_after_the_results(stub):
    for how in (["--json", "/dev/full"], *([each, *FULL] for each in ("--save-result", "--append-result"))):
        done = serve(stub, *how)
        assert done.status == 2 and "/dev/full: No space left" in done.err and "6 in " in done.out, done.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_takes_nothing_from_what_lies_on_others(stub, tmp_path):
    done = serve(stub, "--json", "/dev/full", "--save-result", *FULL, "--out", tmp_path)
    assert done.status == 2 and done.err.count("/dev/full: No space left") == 2
    ((run,), _) = read_runs(tmp_path)
    assert len(run.records) == 6


def test_a_disk_without_room_for_the_records_is_told_before_the_load(stub, tmp_path, monkeypatch):
    seen = len(stub.log)
    details = ["--save-result", "--save-detailed", "--result-dir", tmp_path]
    for free, more in ((2700, ["--out", tmp_path]), (300, details)):
        disk = SimpleNamespace(total=9000, free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda folder, disk=disk: disk)
        done = serve(stub, *more, "--ignore-eos")
        assert done.status == 2 and "0.0 MB are free on its disk" in done.err, done.err
    assert len(stub.log) == seen and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "said"), [(3000, True), (7000, False)])
def test_a_disk_with_room_that_may_do_is_used(stub, tmp_path, monkeypatch, free, said):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=9000, free=free))
    done = serve(stub, "--out", tmp_path)
    assert done.status == 0 and ("may be needed" in done.err) == said


def test_results_are_as_large_as_is_thought_beforehand(stub, tmp_path):
    more = ["--slo-class", "a-name-of-a-class:ttft=200,priority=3", "--ignore-eos", "--result-filename", "all.json"]
    options = ["--out", tmp_path, "--save-result", "--save-detailed", "--result-dir", tmp_path]
    assert serve(stub, *options, *more, "--num-prompts", "60", "--random-output-len", "40").status == 0
    asks = [Ask("x", output_tokens=40)] * 60
    (records,) = tmp_path.glob("*.jsonl")
    for path, each in ((records, RECORD_BYTES), (tmp_path / "all.json", DETAILS_BYTES)):
        size = expected_size(asks, True, each)
        assert size.least < path.stat().st_size < size.most < 3 * size.least


def test_ctrl_c_writes_what_is_there(stub, tmp_path):
    options = ["--num-prompts", "2000", "--request-rate", "50", "--random-output-len", "2", "--random-input-len", "2"]
    options += ["--base-url", stub.url, "--model", "paced", "--out", tmp_path]
    seen = len(stub.log)
    command = [sys.executable, "-c", MAIN, "bench", "serve", *options]
    status, out, err = interrupted(command, lambda: len(stub.log) >= seen + 5)
    assert status == 130, err
    ((run,), _) = read_runs(tmp_path)
    assert run.interrupted and 5 <= len(run.records) < 2000 and "interrupted: " in err and "offered" in out


def test_bounds_of_options_are_those_of_the_data(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a b", "output_tokens": 7}\n{"prompt": "c"}\n')
    options = DataOptions(dataset_name="custom", dataset_path=tmp_path / "p.jsonl", disable_shuffle=True)
    from neustream.workload.sources import Asked
    from neustream.workload.texts import Texts

    asks = options.dataset().asks(Asked(3, 0, Texts()))
    assert [(ask.prompt, ask.input_tokens, ask.output_tokens) for ask in asks] == [
        ("a b", 2, 7),
        ("c", 1, 256),
        ("a b", 2, 7),
    ]
    with pytest.raises(ConfigError, match="--goodput"):
        PromiseOptions(goodput=["x:1"]).limits()
