"""Records of a parquet file; needs pyarrow (`pip install 'neustream[traces]'`)."""

from __future__ import annotations

import gzip
import importlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from neustream.workload.records import Fault, checked_names, open_bytes

ROWS = 8192
"""Rows that are held at a time."""


class Parquet:
    """The columns that are asked for, of some rows at a time; times become microseconds."""

    unit = "row"
    named = True

    def __init__(self, path: Path) -> None:
        try:
            self._arrow = importlib.import_module("pyarrow")
            self._parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise Fault("a parquet file needs pyarrow: pip install 'neustream[traces]'") from None
        self.path = path
        self.line = 0

    def _seekable(self) -> IO[bytes]:
        """The file's content; unpacked into a temporary file where it is gzipped."""
        stream = open_bytes(self.path)
        if not isinstance(stream.raw, gzip.GzipFile):
            return stream
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        try:
            with stream:
                shutil.copyfileobj(stream, unpacked)
        except (EOFError, zlib.error, OSError) as error:
            unpacked.close()
            raise Fault(f"the gzip stream is broken: {error}") from None
        unpacked.seek(0)
        return unpacked

    def columns(self) -> list[str]:
        with self._seekable() as stream:
            try:
                names = list(self._parquet.read_schema(stream).names)
            except Exception as error:  # noqa: BLE001  pyarrow raises many kinds for damaged files
                raise Fault(f"not a parquet file: {error}") from None
        return checked_names(names)

    def take(self, names: Sequence[str], other: Callable[[str], None]) -> Iterator[Sequence[Any]]:
        there = self.columns()
        for name in there:
            if name not in names:
                other(name)
        wanted = [name for name in names if name in there]
        self.line = 0
        with self._seekable() as stream:
            try:
                file = self._parquet.ParquetFile(stream)
                for batch in file.iter_batches(batch_size=ROWS, columns=wanted):
                    cells = {name: self._values(batch.column(name)) for name in wanted}
                    nothing = [None] * batch.num_rows
                    for values in zip(*(cells.get(name, nothing) for name in names), strict=True):
                        self.line += 1
                        yield values
            except Exception as error:  # noqa: BLE001  pyarrow raises many kinds for damaged files
                raise Fault(f"not a parquet file: {error}", self.line + 1) from None

    def _values(self, column: Any) -> list[Any]:
        arrow = self._arrow
        if arrow.types.is_timestamp(column.type):
            return list(column.cast(arrow.timestamp("us", column.type.tz), safe=False).cast(arrow.int64()).to_pylist())
        return list(column.to_pylist())
