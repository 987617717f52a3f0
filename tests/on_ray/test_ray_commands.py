"""The commands on a real Ray."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import yaml

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
if not hasattr(ray, "init"):
    pytest.skip("needs the extra 'ray'", allow_module_level=True)

from toys import command, results, toy  # noqa: E402

from neustream.backends.demo import TEXT  # noqa: E402
from neustream.backends.ray.wire import dumps, loads  # noqa: E402

pytestmark = pytest.mark.ray


def test_run_serves_what_is_simulated(nodes, tmp_path):
    out, section = tmp_path / "out.json", {"engine": "ray", "address": nodes, "instances": 2, "router": "round_robin"}
    done = command("run", toy(tmp_path, cluster=section), "--json", out)
    assert done.status == 0, done.err
    (entry,) = results(out)
    assert entry["counts"]["on_time"] == entry["simulated"]["counts"]["on_time"] == 10
    assert set(entry["members"]) == {"whole-1", "whole-2"} and set(entry["batch_size"]) == {"draw", "decode"}
    assert entry["cluster"]["instances"] == pytest.approx(2.0, rel=0.05)


def test_what_a_main_program_has_goes_to_other_processes(monkeypatch):
    import __main__

    def only_here(device):
        return f"made for {device}"

    only_here.__module__, only_here.__qualname__ = "__main__", "only_here"
    monkeypatch.setattr(__main__, "only_here", only_here, raising=False)
    data = dumps(only_here)
    monkeypatch.delattr(__main__, "only_here")
    assert loads(data)("cpu") == "made for cpu"


def test_a_signal_while_ray_starts_leaves_nothing_behind(nodes, tmp_path):
    """It starts a Ray of its own beside the one that is there."""
    model = {"name": "tiny", "kind": "text", "backend": TEXT, "tokenizer": "bytes", "options": {"measure_s": 0.1}}
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump({"models": [model], "cluster": {"instances": 1}}))
    serving = subprocess.Popen([sys.executable, "-m", "neustream.cli", "serve", str(path), "--port", "0"])
    try:
        process, names, started = psutil.Process(serving.pid), set(), []
        while "raylet" not in names:
            assert serving.poll() is None
            started = process.children(recursive=True)
            for one in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    names.add(one.name())
            time.sleep(0.05)
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0
        _, left = psutil.wait_procs(started, timeout=10)
        assert not left
    finally:
        serving.kill()
        serving.wait()


def test_serve_has_a_cluster_behind_it_and_ends_at_a_signal(nodes, tmp_path):
    model = {"name": "tiny", "kind": "text", "backend": TEXT, "tokenizer": "bytes", "options": {"measure_s": 0.1}}
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump({"models": [model], "cluster": {"instances": 1, "address": nodes}}))
    command_line = [sys.executable, "-u", "-m", "neustream.cli", "serve", str(path), "--port", "0"]
    serving = subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(serving.stdout.readline, "")
        url = next(line.split()[-1] for line in lines if line.startswith("serving on "))
        assert any(line == "ready: tiny\n" for line in lines)
        asked = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True}  # one in 257 tokens ends it
        for _ in range(2):
            told = httpx.post(f"{url}/v1/completions", json=asked, timeout=120)
            assert told.status_code == 200, told.text
            assert told.json()["usage"]["completion_tokens"] == 4
        assert httpx.get(f"{url}/ready").status_code == 200
        page = httpx.get(f"{url}/metrics").text
        routed = [float(line.split()[-1]) for line in page.splitlines() if "instance_routed_total{" in line]
        assert sum(routed) == 2 and 'neustream:instances{state="up"} 1.0' in page
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0
    finally:
        serving.kill()
        serving.wait()
        serving.stdout.close()
