"""The container, the unit and the proxy's config fit the server that they run."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")

from neustream.server.config import HttpConfig, LimitConfig


@pytest.fixture(scope="module")
def folder(root):
    return root / "deploy"


@pytest.fixture(scope="module")
def instructions(folder):
    """Keyword and arguments of each instruction of the Dockerfile."""
    text = re.sub(r"\\\n", " ", (folder / "Dockerfile").read_text())
    parts = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in parts]


def test_hadolint_has_nothing_against_the_dockerfile(folder):
    found = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("no hadolint here: needs the extra 'dev'")
    done = subprocess.run([found, folder / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_dockerfile_names_is_there(root, instructions):
    copied = [rest.split()[:-1] for word, rest in instructions if word == "COPY" and "--from" not in rest]
    assert copied and all((root / name).exists() for names in copied for name in names)
    (extras,) = re.findall(r"\.\[([\w,]+)\]", " ".join(rest for _, rest in instructions))
    known = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
    assert re.search(r"^torch==", (root / "constraints.txt").read_text(), re.MULTILINE)
    assert {word for word, _ in instructions if word == "ARG"} and ("ARG", "TORCH=cpu") in instructions


def test_the_container_is_nobody_of_note_and_can_be_stopped(instructions):
    last = max(at for at, (word, _) in enumerate(instructions) if word == "FROM")
    run = dict(instructions[last:])
    assert run["USER"] == "10001" and run["STOPSIGNAL"] == "SIGTERM" and "/health" in run["HEALTHCHECK"]
    assert run["ENTRYPOINT"] == '["neustream", "serve"]'
    images = [rest for word, rest in instructions if word == "FROM"]
    assert not any(re.search(r":latest|^[^:$]+$", image) for image in images)


def test_the_unit_waits_for_the_drain_and_has_descriptors(folder):
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(folder / "neustream.service")
    service = unit["Service"]
    assert service["ExecStart"].split()[:2] == ["/opt/neustream/bin/neustream", "serve"]
    assert service["KillSignal"] == "SIGTERM" and service["Restart"] == "on-failure"
    assert float(service["TimeoutStopSec"]) >= HttpConfig().shutdown_timeout_s + 10
    assert int(service["LimitNOFILE"]) >= 2 * LimitConfig().max_open + 100


def seconds(text):
    return float(text.rstrip("s"))


def test_the_proxy_passes_streams_on_and_closes_first(folder):
    text = (folder / "nginx.conf").read_text()
    said = dict(re.findall(r"^\s*(\w+) ([^;{]+);", text, re.MULTILINE))
    assert said["proxy_buffering"] == "off" and said["proxy_next_upstream"] == "off"
    assert seconds(said["keepalive_timeout"]) < HttpConfig().keep_alive_s
    assert int(said["client_max_body_size"].rstrip("m")) * 1024 > LimitConfig().image_body_kb
    assert text.count("{") == text.count("}")
