"""What a cluster's front and machines add to what is profiled: measured while it serves a workload."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from neustream.backends.ray.experiments import ClusterSession
from neustream.backends.replaying import Replay
from neustream.config.schema import Config
from neustream.engine.events import Finished, Record
from neustream.errors import BackendError
from neustream.profiling.files import EngineCosts

QUANTILES = 20
"""Of what ways took."""


class _Steps:
    """An observer: seconds of all steps, and what the profiles say of them."""

    def __init__(self) -> None:
        self.took_s = self.profiled_s = 0.0

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished) and not record.error:
            self.took_s += record.at - record.step.started_at
            self.profiled_s += record.step.profiled_s


def cluster_costs(
    config: Config,
    policy: str,
    device: str,
    ended: Callable[[], None],
    started: Callable[[Replay], None],
) -> EngineCosts:
    """Serve a workload on the config's cluster, and see what its ways took, and its steps.

    Args:
        policy: that it is served under, with its router ("fcfs @ slack").
        ended, started: see `Session.serve`.

    Returns:
        `there_s`, `back_s` and `latency_scale`; nothing else is measured.

    Raises:
        BackendError: no request came to its end.
    """
    steps = _Steps()
    with contextlib.closing(ClusterSession(config, device)) as session:
        report = session.serve(policy, [steps], ended, started)
        ways = session.ways.told(report.start)
    there_s, back_s = ways.there.spread(QUANTILES), ways.back.spread(QUANTILES)
    if not (there_s and back_s and steps.profiled_s):
        raise BackendError("no request of the workload was served by the cluster: nothing is known of its ways")
    return EngineCosts(
        there_s=there_s,
        back_s=back_s,
        latency_scale=max(steps.took_s / steps.profiled_s, 1.0),
    )
