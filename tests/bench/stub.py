"""A server that answers as it is told: well, or in one of the ways in which servers misbehave.

What it does is named by the model that a request asks for. It logs when it sent each token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from dataclasses import dataclass, field

from neustream.engine.clock import stopwatch

TOKENS = 4
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": TOKENS, "total_tokens": 7 + TOKENS}


def piece(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(content, eol="\n") -> bytes:
    text = content if isinstance(content, str) else json.dumps(content)
    return f"data: {text}{eol}{eol}".encode()


def text(word, reason=None):
    return {"choices": [{"index": 0, "text": word, "finish_reason": reason}], "usage": None}


def delta(word, reason=None, **more):
    return {"choices": [{"index": 0, "delta": {"content": word, **more}, "finish_reason": reason}]}


def tokens(count=TOKENS, reason="length", eol="\n"):
    return [event(text(f" w{k}", reason if k == count - 1 else None), eol) for k in range(count)]


USED = event({"choices": [], "usage": USAGE})
DONE = event("[DONE]")
ERROR = event({"error": {"message": "out of memory", "type": "server_error", "code": "failed"}})


def plain(status, body, kind="application/json", more=b""):
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n".encode()
    return head + more + b"\r\n" + body


def stream(*events, end=END):
    return SSE + b"".join(piece(each) for each in events) + end


def told(message):
    return json.dumps({"error": {"message": message, "code": "too_many"}}).encode()


def both(k):
    """A token of each of two choices."""
    reason = "length" if k else None
    return [{"choices": [{"index": at, "text": f" w{k}", "finish_reason": reason}]} for at in range(2)]


def counted(tokens):
    return {"prompt_tokens": 7, "completion_tokens": tokens}


def crlf():
    return [each.replace(b"\n", b"\r\n") for each in [*tokens(), USED, DONE]]


def split_anywhere():
    data = b"".join([*tokens(), USED, DONE])
    return SSE + b"".join(piece(data[at : at + 1]) for at in range(len(data))) + END


MANY_LINES = b'data: {"choices": [{"text":\ndata: " w", "finish_reason": "stop"}]}\n\n'
UNFINISHED = tokens(reason=None)
WILD = {"choices": [], "usage": {"prompt_tokens": 10**400, "completion_tokens": True, "neustream": {"x": float("inf")}}}
"""Numbers that Python reads, and that are none of tokens, or of JSON."""
WHOLE = {"choices": [{"text": " a b", "finish_reason": "length"}], "usage": USAGE}
IMAGE = {"created": 0, "data": [{"b64_json": "aGk="}]}
ANSWERS = {
    "good": stream(*tokens(), USED, DONE),
    "no_done": stream(*tokens(), USED),
    "no_usage": stream(*tokens(), DONE),
    "no_finish_reason": stream(*UNFINISHED, DONE),
    "crlf": stream(*crlf()),
    "cr": stream(*[each.replace(b"\n", b"\r") for each in [*tokens(), USED, DONE]]),
    "comments": stream(b": hello\n\n", *tokens(2, None), b": ping\n", *tokens(2), USED, DONE),
    "no_space": stream(*[each.replace(b"data: ", b"data:") for each in [*tokens(), USED, DONE]]),
    "many_lines": stream(*tokens(3, None), MANY_LINES, USED, DONE),
    "named_events": stream(*[b"event: message\nid: 3\n" + each for each in tokens()], USED, DONE),
    "byte_by_byte": split_anywhere(),
    "one_piece": SSE + piece(b"".join([*tokens(), USED, DONE])) + END,
    "double_done": stream(*tokens(), USED, DONE, DONE),
    "error_after_done": stream(*tokens(), USED, DONE, ERROR),
    "until_close": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join([*tokens(), USED, DONE]),
    "http10": b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join([*tokens(), USED, DONE]),
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + stream(*tokens(), USED, DONE),
    "chat": stream(*[event(delta(f" w{k}", "stop" if k == 3 else None)) for k in range(4)], USED, DONE),
    "chat_role_apart": stream(
        event(delta("", role="assistant")),
        *[event(delta(f" w{k}")) for k in range(4)],
        event(delta("", "stop")),
        USED,
        DONE,
    ),
    "chat_role_on_first": stream(
        event(delta("", role="assistant")),
        *[event(delta(f" w{k}", "stop" if k == 2 else None)) for k in range(3)],
        USED,
        DONE,
    ),
    "empty_last_token": stream(*tokens(3, None), event(text("", "stop")), USED, DONE),
    "empty_token": stream(*tokens(2, None), event(text("")), *tokens(1), USED, DONE),
    "chat_thoughts": stream(
        event(delta(None, role="assistant", reasoning_content="")),
        *[event(delta(None, reasoning_content=f" t{k}")) for k in range(2)],
        *[event(delta(f" w{k}", "stop" if k == 1 else None)) for k in range(2)],
        USED,
        DONE,
    ),
    "chat_tool_calls": stream(
        event(delta(None, role="assistant", tool_calls=[{"index": 0, "function": {"name": "f", "arguments": ""}}])),
        *[event(delta(None, tool_calls=[{"index": 0, "function": {"arguments": "1"}}])) for _ in range(3)],
        event(delta(None, "tool_calls")),
        USED,
        DONE,
    ),
    "choices_in_turn": stream(*[event(each) for k in range(2) for each in both(k)], USED, DONE),
    "usage_on_each": stream(*[event({**text(f" w{k}"), "usage": counted(k + 1)}) for k in range(TOKENS)], DONE),
    "early_hints": b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + stream(*tokens(), USED, DONE),
    "wild_usage": stream(*tokens(), event(WILD), DONE),
    "gzip": SSE.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n") + piece(b"\x1f\x8b") + END,
    "error_of_no_letters": stream(event({"error": {"message": "no \ud800\x1b[31m\x00 room", "code": "\x07"}}), DONE),
    "error_then_done": stream(*tokens(2, None), ERROR, DONE),
    "error_then_cut": stream(*tokens(2, None), ERROR, end=b""),
    "error_event_named": stream(*tokens(2, None), b'event: error\ndata: {"message": "no"}\n\n', DONE),
    "error_in_200": plain("200 OK", told("no room")),
    "cut": stream(*tokens(2, None), end=b""),
    "ends_early": stream(*tokens(2, None)),
    "cut_at_once": stream(end=b""),
    "done_only": stream(DONE),
    "nothing": stream(),
    "usage_only": stream(USED, DONE),
    "short": stream(*tokens(2, "stop"), event({"choices": [], "usage": {"completion_tokens": 2}}), DONE),
    "not_json": stream(*tokens(1, None), event("{oops"), *tokens(2), DONE),
    "not_utf8": stream(*tokens(1, None), b"data: \xff\xfe\n\n", DONE),
    "no_object": stream(event("[1, 2]"), *tokens(), DONE),
    "deep": stream(event("[" * 100_000), DONE),
    "html": plain("200 OK", b"<html>Welcome</html>", "text/html"),
    "html_500": plain("500 Internal Server Error", b"<html>oops</html>", "text/html"),
    "no_type": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    "redirect": plain("307 Temporary Redirect", b"", more=b"location: /elsewhere\r\n"),
    "s429": plain("429 Too Many Requests", told("queue full"), more=b"retry-after: 1\r\n"),
    "s503": plain("503 Service Unavailable", told("loading")),
    "s404": plain("404 Not Found", b'{"detail":"Not Found"}'),
    "s204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "no_http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "hang_up": b"",
    "bad_chunk": SSE + piece(tokens()[0]) + b"zz\r\n",
    "whole": plain("200 OK", json.dumps(WHOLE).encode()),
    "whole_not_json": plain("200 OK", b"{"),
    "whole_cut": plain("200 OK", json.dumps(WHOLE).encode())[:-5],
    "whole_empty": plain("200 OK", b'{"choices": [{"text": ""}]}'),
    "whole_message": plain(
        "200 OK", b'{"choices": [{"message": "hi"}, {"message": {"reasoning": "a", "content": "b"}}]}'
    ),
    "whole_gzip": plain("200 OK", b"\x1f\x8b", more=b"content-encoding: gzip\r\n"),
    "image": plain("200 OK", json.dumps(IMAGE).encode()),
    "no_image": plain("200 OK", b'{"data": [{}]}'),
    "image_stream": stream(
        event({"type": "image_generation.partial_image", "b64_json": "aGk="}),
        event({"type": "image_generation.completed", "b64_json": "aGk="}),
    ),
    "image_stream_cut": stream(event({"type": "image_generation.partial_image", "b64_json": "aGk="}), end=b""),
}
"""Name -> the bytes of the answer."""
KEEPS = {"good", "chat", "whole", "image", "s429"}
"""Behind these the connection stays open."""


@dataclass
class Served:
    """One request that came: what it asked for, and when the stub did what."""

    path: str
    headers: dict[str, str]
    body: dict
    came: float
    sent: list[float] = field(default_factory=list)


class Stub:
    """The server, on a thread of its own. A context manager.

    Models beside `ANSWERS`: "stall" sends a token and no more; "silent" never answers; "paced"
    sends `max_tokens` tokens, `gap_s` apart, after `first_s`; `at_once` bounds how many "paced" ones
    are served at a time (None: all), so that its capacity is known.
    """

    def __init__(self, first_s=0.005, gap_s=0.002, at_once=None):
        self.first_s, self.gap_s, self.at_once = first_s, gap_s, at_once
        self.log: list[Served] = []
        self.connections = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exc):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def _main(self):
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._places = asyncio.Semaphore(self.at_once or 10**6)
        self._tasks = set()
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        start, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        served = Served(start.split()[1], headers, json.loads(body or b"{}"), stopwatch())
        self.log.append(served)
        if start.startswith("GET"):
            writer.write(plain("200 OK", b'{"data": [{"id": "paced"}]}'))
            return True
        name = served.body.get("model", "good")
        if name in ANSWERS:
            writer.write(ANSWERS[name])
            await writer.drain()
            return name in KEEPS
        return await self._slowly(name, served, writer)

    async def _slowly(self, name, served, writer):
        if name == "paced":
            async with self._places:
                await self._paced(served, writer)
            return True
        if name == "stall":
            writer.write(SSE + piece(tokens()[0]))
        await self._stop.wait()
        return False

    async def _paced(self, served, writer):
        count = served.body["max_tokens"]
        writer.write(SSE)
        due = stopwatch() + self.first_s
        for k in range(count):
            await asyncio.sleep(max(0.0, due - stopwatch()))
            writer.write(piece(event(text(f" w{k}", "length" if k == count - 1 else None))))
            served.sent.append(stopwatch())
            due += self.gap_s
        usage = {"prompt_tokens": 7, "completion_tokens": count}
        writer.write(piece(event({"choices": [], "usage": usage})) + piece(DONE) + END)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
