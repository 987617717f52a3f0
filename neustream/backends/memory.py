"""How much of the machine's memory a process may still take."""

from __future__ import annotations

import contextlib
from pathlib import Path

SYSTEM = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
"""Of the process itself, where it is in a container."""


def free_bytes(system: Path = SYSTEM, group: Path = GROUP) -> int | None:
    """Bytes that are free, or could be made so, in the system and the container; None: that is not known here."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(line for line in system.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max": without a limit
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(most - used + _read_files(group))
    return max(min(found), 0) if found else None


def _read_files(group: Path) -> int:
    """Bytes of files that were read and are kept while nobody else wants the room: they count as used."""
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                return int(value)
    return 0
