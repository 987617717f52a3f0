"""Files that commands write: checked before the work begins, and written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from neustream.commands.printing import problems
from neustream.engine.trace import REQUEST_BYTES
from neustream.errors import ConfigError

STDOUT = Path("-")
ROOM = 2**16
"""Bytes that a disk must have free for a file, before the work begins."""


def check_outputs(outputs: Iterable[tuple[str, Path]]) -> None:
    """Make the folders that files will lie in, and see that each file can be written.

    Raises:
        ConfigError: it names the option, the path, and what is in the way.
    """
    seen: dict[Path, str] = {}
    for option, path in outputs:
        if path == STDOUT:
            raise ConfigError(f"{option} -: only --json can go to stdout; give a file")
        try:
            whole = path.resolve()
            _check(whole)
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
            why = (error.strerror if isinstance(error, OSError) else str(error)) or "cannot be written"
            raise ConfigError(f"{option} {path}: {why[0].lower()}{why[1:]}") from None
        if whole in seen and not stat.S_ISCHR(_mode(whole)):
            raise ConfigError(f"{option} {path}: {seen[whole]} goes to the same file")
        seen[whole] = option


def json_file(path: Path | None) -> list[tuple[str, Path]]:
    """The file that `--json` asks for, to be checked; none if it is not asked for, or stdout."""
    return [] if path is None or path == STDOUT else [("--json", path)]


def check_folder(option: str, folder: Path, names: Iterable[str]) -> None:
    """The same for files in a folder that is made if it is missing."""
    if folder == STDOUT:
        raise ConfigError(f"{option} -: only --json can go to stdout; give a folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {folder}: is no folder")
    check_outputs((option, folder / name) for name in names)


def check_room(option: str, folder: Path, least: float, most: float = 0.0) -> None:
    """See that the disk of a folder that is there has so many bytes free.

    Where it has `least` and not `most`, that is said on stderr.

    Raises:
        ConfigError: it has not even `least`.
    """
    disk = shutil.disk_usage(folder)
    if not disk.total or disk.free >= max(least, most):  # some file systems tell of no size at all
        return
    free = f"{disk.free / 1e6:,.1f} MB are free on its disk"
    if disk.free < least:
        raise ConfigError(f"{option} {folder}: at least {least / 1e6:,.1f} MB are needed, {free}")
    problems.print(f"{option} {folder}: up to {most / 1e6:,.1f} MB may be needed, {free}", soft_wrap=True)


def check_traces(traces: Iterable[Path], requests: int) -> None:
    """ConfigError if a disk has no room for the traces of so many requests each, as far as is known beforehand."""
    for folder, paths in by_folder(traces).items():
        check_room("--trace", folder, REQUEST_BYTES * requests * len(paths))


def by_folder(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """Paths by the folder that they lie in."""
    found: dict[Path, list[Path]] = {}
    for path in paths:
        found.setdefault(path.parent, []).append(path)
    return found


def _mode(path: Path) -> int:
    return path.stat().st_mode if path.exists() else 0


def _check(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(21, "is a directory")
    there = next(folder for folder in path.parents if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(20, f"{there} is not a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "permission denied")
        if path.is_fifo():
            raise OSError(29, "is a named pipe, which waits for a reader; give a file, or - for stdout")
        if not path.is_file():
            return
        path.open("ab").close()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.") as draft:
        draft.write(bytes(ROOM))  # a full disk says so now
        draft.flush()
        os.fsync(draft.fileno())  # and one behind a network or a quota


def write_text(path: Path, text: str) -> None:
    """Write a file and the folder that it lies in; one that is there is replaced in one go."""
    try:
        _write_whole(path.resolve(), text)
    except OSError as error:
        if error.filename is None:  # of a full disk the system does not say where
            error.filename = str(path)
        raise


def _write_whole(whole: Path, text: str) -> None:
    whole.parent.mkdir(parents=True, exist_ok=True)
    if whole.exists() and not whole.is_file():  # a device or a pipe
        whole.write_text(text)
        return
    draft = whole.with_name(f".{whole.name[:40]}.{os.getpid()}.tmp")
    try:
        draft.write_text(text)
        draft.replace(whole)
    finally:
        draft.unlink(missing_ok=True)


def write_each(*parts: Callable[[], None]) -> None:
    """Write several outputs, also where one cannot be written; then raise what was the first to fail."""
    faults: list[OSError] = []
    for part in parts:
        try:
            part()
        except OSError as error:
            faults.append(error)
    for fault in faults[1:]:
        problems.print(f"cannot write: {fault.filename}: {fault.strerror or fault}", soft_wrap=True)
    if faults:
        raise faults[0]


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all; others may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        whole = not size or file.read(1) == b"\n"
        try:
            _write_all(file.fileno(), f"{'' if whole else chr(10)}{line}\n".encode())
        except OSError as error:
            with contextlib.suppress(OSError):  # a device has no size
                file.truncate(size)
            error.filename = error.filename or str(path)
            raise


def _write_all(number: int, data: bytes) -> None:
    while data:
        data = data[os.write(number, data) :]


def json_text(content: Any) -> str:
    """Results as JSON, which knows no infinity and no NaN."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


@contextlib.contextmanager
def json_output(path: Path | None) -> Iterator[Callable[[Any], None]]:
    """How results are written to a file, to stdout (`-`), or nowhere.

    While they go to stdout, what the command (or a module that it imports) prints goes to stderr.
    """
    if path is None:
        yield lambda content: None
    elif path != STDOUT:
        yield lambda content: write_text(path, json_text(content))
    else:
        results: list[str] = []
        out = sys.stdout
        try:
            with _diverted(out):
                yield lambda content: results.append(json_text(content))
        finally:
            out.write("".join(results))
            out.flush()


@contextlib.contextmanager
def _diverted(out: TextIO) -> Iterator[None]:
    """Stdout is stderr meanwhile: of Python, and of the process where `out` is a real file."""
    try:
        number, other = out.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    out.flush()
    kept = os.dup(number)
    os.dup2(other, number)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
