"""A process that ends at once takes along what it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

PROGRAM = """
import os, subprocess
from neustream.server.children import end_children

shell = 'trap "" TERM; sleep 600 & echo $!; sleep 600 & echo $!; echo; wait'
tree = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True)
pids = [tree.pid, *[int(line) for line in iter(tree.stdout.readline, "\\n")]]
print(*pids, flush=True)
end_children()
os._exit(7)
"""


def runs(pid):
    """Whether a process runs; one that has ended may wait to be noticed."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return os.path.exists(f"/proc/{pid}")


def test_children_and_theirs_end_even_those_that_do_not_want_to():
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, check=False)
    pids = [int(pid) for pid in done.stdout.split()]
    left = [pid for pid in pids if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert done.returncode == 7 and len(pids) == 3 and not left
