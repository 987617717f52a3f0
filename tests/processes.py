"""Programs that tests start, and interrupt."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Finished(NamedTuple):
    """What came of a program."""

    status: int
    out: str
    err: str


@contextlib.contextmanager
def running(command: Sequence[object], **options) -> Iterator[subprocess.Popen[str]]:
    """A program with pipes for what it prints; neither outlives the block."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(each) for each in command], **pipes, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def interrupted(command: Sequence[object], ready: Callable[[], bool], **options) -> Finished:
    """Run a program, press Ctrl-C once it is `ready`, and say what came of it."""
    with running(command, **options) as process:
        pause = threading.Event()
        while not ready() and process.poll() is None:
            pause.wait(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        return Finished(process.returncode, out, err)
