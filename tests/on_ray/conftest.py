"""Two nodes of a Ray cluster on this machine; all that they started is gone at the end."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parent / "backends"), str(HERE.parent.parent)]
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"


@pytest.fixture(scope="session")
def nodes():
    """The address of a cluster of two nodes with two CPUs each."""
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    import psutil
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = PATHS
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster.address
    started = psutil.Process().children(recursive=True)
    cluster.shutdown()
    _, left = psutil.wait_procs(started, timeout=30)
    names = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            names.append(process.name())
            process.kill()
    assert not names, f"processes were left behind: {names}"
