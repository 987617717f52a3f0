"""What the HTTP front itself costs for each token: streams of a thread that only hands tokens over.

    python benchmarks/http_front.py [--streams 32] [--tokens 100] [--step-ms 30] [--rounds 3]

No model: a thread brings every stream a token each `--step-ms`, as an engine's step does. In turns, the
front of `neustream serve` streams them to a client in another process, and a bare ASGI application, under
the same uvicorn, sends events of the same size by itself: less than that is not to be had with this server and
its parser. Told: microseconds of CPU a token of the server's process, but for the thread that hands over.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import threading
import time
from multiprocessing.pool import Pool
from types import SimpleNamespace
from typing import Any

import uvicorn
from arguments import at_least_one
from http_here import Here
from http_load import HOST, streamed
from rich.console import Console

from neustream.analysis.tables import new_table
from neustream.core.events import Emitted
from neustream.server.lifecycle import keep_still
from neustream.server.loading import Loaded
from neustream.server.metrics import Metrics
from neustream.server.models import TextModel
from neustream.service.answer import Answer

PROMPT = [1, 2]
EVENT = (
    b'data: {"id": "cmpl-0123456789abcdef0123456789abcdef", "object": "text_completion", "created": 1795761880, '
    b'"model": "tiny", "choices": [{"index": 0, "text": "a", "logprobs": null, "finish_reason": null}]}\n\n'
)


class Tokens:
    """A model's own engine: a thread hands each request a token a step."""

    fault = ""

    def __init__(self, tokens: int, step_s: float) -> None:
        self.jobs: dict[str, Any] = {}
        self.cpu_s = 0.0
        self._tokens, self._step_s = tokens, step_s
        self._open: list[Answer[Any]] = []
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, *args: Any, id: str, **options: Any) -> Answer[Any]:
        answer: Answer[Any] = Answer(id, "tiny", lambda _: None, lambda: self._read)
        self._open.append(answer)
        return answer

    async def close(self) -> None:
        self._open.clear()

    def _read(self, output: Emitted) -> Any:
        reason = "length" if output.index + 1 == self._tokens else None
        return SimpleNamespace(id=1, text="a", finish_reason=reason, likelihood=None, scores=())

    def _work(self) -> None:
        while True:
            time.sleep(self._step_s)
            for answer in list(self._open):
                answer.push(Emitted(answer.id, answer.count, {"token": 1}, 0.0, 0.0))
                if answer.count == self._tokens:
                    self._open.remove(answer)
                    if answer.set_running_or_notify_cancel():
                        answer.set_result(None)
            self.cpu_s = time.thread_time()


def front(model: Tokens) -> int:
    """The port of the front of `neustream serve`, before a model's own engine."""

    def load(metrics: Metrics) -> Loaded:
        return Loaded(None, [TextModel("tiny", None, 100_000, 64, batch=1024, own=model)])

    return Here(load).port


def bare(tokens: int, step_s: float) -> int:
    """The port of an application that sends as many events, as often, and does nothing else."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for _ in range(tokens):
            await asyncio.sleep(step_s)
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    sock = socket.create_server((HOST, 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as asyncio has it where it makes the socket
    config = uvicorn.Config(app, log_level="error", http="h11", loop="asyncio", lifespan="off")
    server = uvicorn.Server(config)
    threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True).start()
    port: int = sock.getsockname()[1]
    return port


def cost(pool: Pool, port: int, model: Tokens, options: argparse.Namespace) -> float:
    """Microseconds of CPU for each token of a round, but for the handing over."""
    before = time.process_time() - model.cpu_s
    pool.apply(streamed, (port, PROMPT, options.streams, options.tokens))
    time.sleep(2 * options.step_ms / 1e3)  # the thread has told of its time
    seconds: float = time.process_time() - model.cpu_s - before
    count: int = options.streams * options.tokens
    return seconds / count * 1e6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=at_least_one, default=32)
    parser.add_argument("--tokens", type=at_least_one, default=100)
    parser.add_argument("--step-ms", type=float, default=30.0)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    options = parser.parse_args(arguments)
    model = Tokens(options.tokens, options.step_ms / 1e3)
    ports = {"the front": front(model), "bare uvicorn": bare(options.tokens, options.step_ms / 1e3)}
    keep_still()
    found: dict[str, list[float]] = {name: [] for name in ports}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for port in ports.values():
            pool.apply(streamed, (port, PROMPT, 2, options.tokens))  # all is warm then
        for _ in range(options.rounds):
            for name, port in ports.items():
                found[name].append(cost(pool, port, model, options))
    table = new_table(f"{options.streams} streams: CPU, us/token", "", ["median", "least", "most"])
    for name, each in found.items():
        table.add_row(name, f"{statistics.median(each):.1f}", f"{min(each):.1f}", f"{max(each):.1f}")
    Console(markup=False, highlight=False).print(table)


if __name__ == "__main__":
    main()
