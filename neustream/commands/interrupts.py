"""Ends from outside: Ctrl-C (status 130, with what is done; engines end their open requests), closed pipes."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, Protocol

import typer

from neustream.errors import NeustreamError

INTERRUPTED = 130
SEEN_ENOUGH = 141
"""Whoever read the output closed it."""
pressed = threading.Event()
"""Whether it was Ctrl-C that raised a KeyboardInterrupt, and not a policy or a model."""


def _press(number: int, frame: FrameType | None) -> NoReturn:
    pressed.set()
    raise KeyboardInterrupt


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which Ctrl-C and a reader who leaves end with statuses of their own."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        pressed.clear()
        before = signal.signal(signal.SIGINT, _press)
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise_unless_pressed("the command")
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # here, since typer would end with 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(SEEN_ENOUGH) from None
        finally:
            signal.signal(signal.SIGINT, before)

    return run


def raise_unless_pressed(what: str) -> None:
    """In the face of a KeyboardInterrupt that nobody's Ctrl-C raised: an error of one line."""
    if not pressed.is_set():
        raise NeustreamError(f"{what} raised KeyboardInterrupt, without Ctrl-C") from None


class Work(Protocol):
    """What can be interrupted by a signal handler."""

    def interrupt(self) -> None: ...


class Interrupts:
    """Ctrl-C ends the open requests of the work being watched as cancelled; a second one the program."""

    def __init__(self) -> None:
        self.hit = False
        self._work: Work | None = None

    def watch(self, work: Work) -> None:
        """Interrupt this, and nothing before it."""
        self._work = work
        if self.hit:
            work.interrupt()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.hit = True
        signal.signal(signal.SIGINT, self._before)
        if self._work is not None:
            self._work.interrupt()

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)
