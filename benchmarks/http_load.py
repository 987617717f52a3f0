"""A server in a process of its own, and requests to it over plain sockets, for benchmarks of the front."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HOST = "127.0.0.1"
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Served:
    """A server that runs: its port and its process."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def metrics(self) -> dict[str, float]:
        """All samples, by name and labels as the page writes them."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}


def total(samples: Mapping[str, float], name: str, *labels: str) -> float:
    """The sum of a metric's samples that have all `labels`, as `outcome="late"`."""
    found = 0.0
    for key, value in samples.items():
        if key.partition("{")[0] == f"neustream:{name}" and all(label in key for label in labels):
            found += value
    return found


@contextlib.contextmanager
def serving(config: Mapping[str, Any], log: Path | None = None) -> Iterator[Served]:
    """`neustream serve` of a config on a free port, until the end of the block; `log` gets its stderr."""
    with tempfile.TemporaryDirectory() as folder, _open(log) as stderr:
        path = Path(folder) / "server.yaml"
        path.write_text(yaml.safe_dump({"http": {"port": 0}, **config}))
        command = [sys.executable, "-c", "from neustream.cli import main; main()", "serve", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout is not None
            port = int(re.findall(r":(\d+)$", process.stdout.readline().strip())[0])
            if not process.stdout.readline().startswith("ready: "):
                raise SystemExit("the server did not get ready")
            yield Served(port, process.pid)
            process.terminate()
            if code := process.wait(120):
                raise SystemExit(f"the server ended with code {code}")
        finally:
            process.kill()
            process.wait()


def _open(log: Path | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if log is None else log.open("w")


def post(path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a request, on a connection of its own."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"host: {HOST}", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += ["connection: close", f"content-length: {len(data)}", "", ""]
    return "\r\n".join(lines).encode() + data


@dataclass
class Heard:
    """What came back.

    Attributes:
        raw: all of it; tokens: events with one.
        left: we went away first; lost: we gave up waiting.
        first_s, last_s: seconds from the sending to the first and the last bytes that came; None: none did.
        whole_s: seconds until it was over.
    """

    raw: bytes = b""
    tokens: int = 0
    left: bool = False
    lost: bool = False
    first_s: float | None = None
    last_s: float | None = None
    whole_s: float = 0.0

    @property
    def status(self) -> int:
        """0: nothing came."""
        found = re.match(rb"HTTP/1\.1 (\d{3})", self.raw)
        return int(found[1]) if found else 0

    @property
    def whole(self) -> bool:
        """Whether the answer came to its end."""
        head, _, body = self.raw.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            return body.endswith(b"0\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length is None:  # the connection's end is the answer's
            return b"connection: close" in head.lower()
        return len(body) == int(length[1])

    @property
    def done(self) -> bool:
        return self.whole and (b"data: [DONE]" in self.raw or b'"usage"' in self.raw or b"b64_json" in self.raw)


async def ask(port: int, request: bytes, leave_after: int | None = None, patience_s: float = 120.0) -> Heard:
    """Send a request and read its answer; go away after so many tokens (0: at once) if that is said.

    It is lost after `patience_s` seconds in which nothing came.
    """
    heard, began = Heard(), time.monotonic()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        async with asyncio.timeout(patience_s) as limit:
            writer.write(request)
            await writer.drain()
            while leave_after is None or heard.tokens < leave_after:
                part = await reader.read(65_536)
                heard.raw += part
                heard.tokens += part.count(b'"choices": [{')
                if not part:
                    return heard
                heard.last_s = time.monotonic() - began
                limit.reschedule(asyncio.get_running_loop().time() + patience_s)
                if heard.first_s is None:
                    heard.first_s = heard.last_s
        heard.left = True
    except TimeoutError:
        heard.lost = True
    except ConnectionError:
        pass
    finally:
        heard.whole_s = time.monotonic() - began
        writer.transport.abort()
    return heard


def streamed(port: int, prompt: list[int], streams: int, tokens: int) -> float:
    """Seconds until so many streams of one prompt are whole; SystemExit if one is not."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}

    async def main() -> float:
        began = time.perf_counter()
        heard = await asyncio.gather(*[ask(port, post("/v1/completions", body)) for _ in range(streams)])
        seconds = time.perf_counter() - began
        if wrong := [each.raw[:300] for each in heard if not each.done or each.tokens != tokens]:
            raise SystemExit(f"{len(wrong)} streams are not whole: {wrong[0]!r}")
        return seconds

    return asyncio.run(main())
