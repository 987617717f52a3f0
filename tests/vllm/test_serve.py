"""`vllm serve` with our scheduler class, as its clients see it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CLI = Path(__file__).parent / "vllm_cli.py"
PROMPT = " ".join(f"w{4 + at}" for at in range(40))


class Server:
    """A server process, its address and its log."""

    def __init__(self, model, folder, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.model, self.log = model, folder / "server.log"
        settings = folder / "neustream.yaml"
        settings.write_text("policy: default\nlog_every_s: 0.5\n")
        given = [
            *("serve", str(model), "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "opt"),
            *("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"),
            *("--no-enable-prefix-caching", "--scheduler-cls", "neustream.backends.vllm.SLOScheduler"),
            *("--additional-config", json.dumps({"neustream": {"config": str(settings)}})),
            *("--trust-request-chat-template", "--gpu-memory-utilization", "0.1", *more),
        ]
        self.process = subprocess.Popen(
            [sys.executable, str(CLI), *given], stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=environment()
        )

    def wait(self, most=240):
        import httpx

        for _ in range(most * 2):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def running(self):
        import httpx

        text = httpx.get(f"{self.url}/metrics").text
        return sum(
            float(value) for value in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.M)
        )

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def environment():
    given = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return given | {"VLLM_LOGGING_LEVEL": "INFO"}


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    made = Server(model, tmp_path_factory.mktemp("serve"))
    try:
        made.wait()
        yield made
    finally:
        made.close()


@pytest.fixture
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def complete(client, promise=None, tokens=8, **more):
    body = {"vllm_xargs": promise} if promise else {}
    return client.completions.create(
        model="opt", prompt=PROMPT, max_tokens=tokens, temperature=0, extra_body=body | {"ignore_eos": True}, **more
    )


def test_a_promised_request_gets_the_same_answer(client):
    plain, promised = complete(client), complete(client, {"slo_ttft_ms": 30_000, "slo_tpot_ms": 5_000})
    assert promised.choices[0].finish_reason == "length"
    assert promised.choices[0].text == plain.choices[0].text != ""
    assert promised.usage.completion_tokens == 8


def test_a_hopeless_request_is_told_why(client):
    choice = complete(client, {"slo_ttft_ms": 0.01}).choices[0]
    assert choice.finish_reason == "abort" and choice.text == ""
    assert choice.stop_reason.startswith("slo: hopeless")


def test_a_hopeless_stream_ends_with_the_reason(client):
    (chunk,) = complete(client, {"slo_ttft_ms": 0.01}, stream=True)
    (choice,) = chunk.choices
    assert choice.finish_reason == "abort" and choice.text == ""
    assert choice.stop_reason.startswith("slo: hopeless")
    chat = {"model": "opt", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 4, "stream": True}
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    extra = {"vllm_xargs": {"slo_ttft_ms": 0.01}, "chat_template": template}
    *_, last = client.chat.completions.create(**chat, extra_body=extra)
    assert last.choices[0].finish_reason == "abort" and last.choices[0].stop_reason.startswith("slo: hopeless")


def test_a_hopeless_stream_that_asks_for_likelihoods_ends(client):
    chunks = list(complete(client, {"slo_ttft_ms": 0.01}, stream=True, logprobs=2))
    assert all(not chunk.choices[0].text for chunk in chunks)  # vLLM has no chunk for the reason


@pytest.mark.parametrize(
    "wrong", [{"slo_ttft_ms": "soon"}, {"slo_ttft_ms": -5}, {"slo_tftt_ms": 5}, {"slo_tpot_ms": 5}]
)
def test_values_that_make_no_sense_are_ignored_with_one_warning(server, client, wrong):
    for _ in range(2):
        assert complete(client, wrong).choices[0].finish_reason == "length"
    key = next(iter(wrong))
    warned = [line for line in server.log.read_text().splitlines() if "ignored, from now on" in line and key in line]
    assert 1 <= len(warned) <= 2  # of -5 and "soon", which are two kinds


@pytest.mark.parametrize(
    "more, says",
    [
        ({"tokens": 0}, "max_tokens"),
        ({"prompt": " ".join(["w9"] * 600)}, "512"),
        ({"promise": {"slo": {"ttft": 5}}}, "vllm_xargs"),
    ],
)
def test_what_vllm_refuses_it_still_refuses(client, more, says):
    from openai import BadRequestError

    given = {"prompt": PROMPT, "tokens": 8, "promise": {"slo_ttft_ms": 30_000}} | more
    with pytest.raises(BadRequestError, match=says):
        client.completions.create(
            model="opt",
            prompt=given["prompt"],
            max_tokens=given["tokens"],
            extra_body={"vllm_xargs": given["promise"]},
        )


def test_a_client_that_goes_in_mid_stream_takes_its_request_along(server, client):
    stream = complete(client, {"slo_ttft_ms": 30_000, "slo_tpot_ms": 5_000}, tokens=450, stream=True)
    for at, _ in enumerate(stream):
        if at == 5:
            break
    assert server.running() > 0
    stream.close()
    for _ in range(100):
        if not server.running():
            break
        time.sleep(0.05)
    assert server.running() == 0
    assert complete(client, {"slo_ttft_ms": 30_000}).choices[0].finish_reason == "length"


def test_counters_are_logged(server, client):
    time.sleep(0.6)
    complete(client, {"slo_ttft_ms": 30_000})
    time.sleep(0.2)
    assert re.search(r"neustream: \{'steps': \d+, 'steered': [1-9]", server.log.read_text())


def test_the_benchmark_of_vllm_counts_goodput(server, tmp_path):
    given = [
        *("bench", "serve", "--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"),
        *("--model", "opt", "--tokenizer", str(server.model), "--dataset-name", "random", "--random-input-len", "64"),
        *("--random-output-len", "16", "--num-prompts", "40", "--request-rate", "40", "--seed", "1", "--ignore-eos"),
        *("--temperature", "0", "--goodput", "ttft:1000", "tpot:100", "--disable-tqdm", "--save-result"),
        *("--result-dir", str(tmp_path), "--result-filename", "result.json"),
        *("--extra-body", json.dumps({"vllm_xargs": {"slo_ttft_ms": 1000, "slo_tpot_ms": 100}})),
    ]
    done = subprocess.run(
        [sys.executable, str(CLI), *given], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] >= 20 and result["request_goodput"] > 0


@pytest.fixture(scope="module")
def honest(model, tmp_path_factory):
    """One with our middleware."""
    made = Server(model, tmp_path_factory.mktemp("honest"), "--middleware", "neustream.backends.vllm.HonestDrops")
    try:
        made.wait()
        yield made
    finally:
        made.close()


def test_with_the_middleware_a_drop_is_an_error(honest):
    from openai import BadRequestError, OpenAI

    with OpenAI(base_url=f"{honest.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for stream in (False, True):
            with pytest.raises(BadRequestError, match="hopeless") as raised:  # not even alone
                complete(client, {"slo_ttft_ms": 0.01}, stream=stream)
            assert raised.value.code == "unattainable"
            assert raised.value.response.headers["x-should-retry"] == "false"
        chunks = list(complete(client, {"slo_ttft_ms": 30_000}, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) == 8
