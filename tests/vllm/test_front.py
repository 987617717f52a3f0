"""A real vLLM behind the HTTP front: `kind: vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import importlib.metadata, sys
from neustream.cli import main

if __name__ == "__main__":
    sys.argv = ["neustream", "serve", *sys.argv[1:]]
    main()
"""


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("front")
    config, script = folder / "server.yaml", folder / "serve.py"
    options = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4, "gpu_memory_utilization": 0.1}
    known = {"name": "opt", "kind": "vllm", "path": str(model), "options": options}
    config.write_text(json.dumps({"models": [known], "http": {"port": 0}}))
    script.write_text(CODE)
    given = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(script), str(config)], stdout=subprocess.PIPE, stderr=log, text=True, env=given
    )
    try:
        address = process.stdout.readline().strip().removeprefix("serving on ")
        assert process.stdout.readline() == "ready: opt\n", (folder / "log").read_text()[-3000:]
        yield address
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        log.close()


def ask(url, **more):
    import httpx

    body = {"prompt": "w5 w6 w7", "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def test_texts_streams_and_likelihoods(url):
    whole = ask(url, logprobs=2).json()
    assert whole["usage"]["completion_tokens"] == 6
    (choice,) = whole["choices"]
    assert len(choice["logprobs"]["tokens"]) == 6 and choice["finish_reason"] == "length"
    lines = ask(url, stream=True).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
    assert "".join(chunks) == choice["text"] and len(chunks) == 6
    echoed = ask(url, echo=True, logprobs=0).json()["choices"][0]
    assert echoed["text"].startswith("w5 w6 w7") and echoed["logprobs"]["token_logprobs"][0] is None


def test_promises_are_kept_or_told(url):
    kept = ask(url, slo={"ttft_ms": 60_000, "tpot_ms": 60_000, "report": True})
    assert kept.headers["x-neustream-outcome"] == "on_time" and kept.json()["usage"]["neustream"]["on_time"]
    for stream in (False, True):
        dropped = ask(url, slo={"ttft_ms": 0.01}, stream=stream)  # not even alone
        assert dropped.status_code == 400 and dropped.json()["error"]["code"] == "unattainable"
