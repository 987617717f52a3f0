"""What the operator's guide says is so: its lines run against the server that it names."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
openai = pytest.importorskip("openai", reason="needs the extra 'dev'")

from serving import serving  # noqa: E402
from toys import Flat, command  # noqa: E402

from neustream.backends.loading import load  # noqa: E402
from neustream.commands.serve import say_of_demo  # noqa: E402
from neustream.commands.serve_config import Source, settings_of  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def guide(root):
    return (root / "neustream/server/README.md").read_text()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The demo, measured in no time."""
    demo = settings_of(Source(None, demo=True), {}, {}, ())
    text, image = demo.models
    options = {"measure_s": 0.0, "cache": str(tmp_path_factory.mktemp("cache"))}
    models = [
        text.model_copy(update={"options": {"profile": Flat(), "slots": 8}}),
        image.model_copy(update={"options": options}),
    ]
    config = demo.model_copy(update={"models": models})
    with serving(lambda metrics: load(config, metrics)) as (url, said, _):
        assert said.get(timeout=600) == "ready: tiny-text, tiny-image"
        yield url


def lines(guide):
    """The status and the command of each line for curl."""
    blocks = re.findall(r"^```bash curl\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    return re.findall(r"^# (\d+): .*\n((?:.+\n)+)", "\n".join(blocks), re.MULTILINE)


def patient(text):
    """The same with promises a hundred times as long: what is promised in earnest depends on the machine."""
    return re.sub(r"(_ms\"?: |-ms: |-ms )(\d+)\b(?!\.)", lambda found: f"{found[1]}{int(found[2]) * 100}", text)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_each_line_for_curl_gets_its_status(guide, url):
    found = lines(guide)
    assert len(found) >= 7
    for status, line in found:
        shell = patient(line).strip().replace("curl localhost:8000", f"curl -sS -i {url}")
        done = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=120)
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode()), (line, done.stdout[:500], done.stderr)
        if "soon" in line:
            assert b"x-neustream-warning: x-slo-ttft-ms" in head
        if '"report"' in line:
            assert b'"on_time": true' in body and body.rstrip().endswith(b"data: [DONE]")
        if "unattainable" in line:
            assert b'"unattainable"' in body


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_demo_says_what_a_newcomer_may_try(url, capsys):
    say_of_demo(f"serving on {url}")
    say_of_demo("ready: tiny-text, tiny-image")
    told = capsys.readouterr()
    assert told.out == f"serving on {url}\nready: tiny-text, tiny-image\n" and f"{url}/ui" in told.err
    (line,) = re.findall(r"^    (curl .*)$", told.err, re.MULTILINE)
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=120)
    assert b'"text_completion"' in done.stdout, done.stdout
    say_of_demo("serving on /run/neustream.sock")
    assert capsys.readouterr().err == ""


def test_the_lines_for_the_openai_package_run(guide, url, capsys):
    (code,) = re.findall(r"^```python no-run\n(import openai.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    left = {}
    exec(patient(code).replace("http://localhost:8000", url), left)
    left["client"].close()
    assert left["image"].data[0].b64_json and "on_time" in capsys.readouterr().out


def test_the_lines_for_the_client_run(guide, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r'^    neustream client "([^"]*)" (.*)$', guide, re.MULTILINE)
    assert len(found) == 2
    for prompt, options in found:
        done = command("client", prompt, *patient(options).split(), "--url", url)
        assert done.status == 0 and done.err.startswith("on time\n"), done.err
    assert (tmp_path / "lighthouse.png").exists()
