"""What was served beside what is simulated: by the profiles, and on the device as it was meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from neustream.analysis.fidelity import Outcome, Watch, error, errors_table
from neustream.analysis.tables import new_table
from neustream.analysis.took import Took
from neustream.backends.ray.experiments import ClusterSession
from neustream.backends.serving import Session
from neustream.cluster.ways import Took as WaysTook
from neustream.commands.printing import console
from neustream.config.schema import Simulation
from neustream.core.batch import Batch
from neustream.engine.report import Report
from neustream.experiment.running import ByModel, record, simulate


@dataclass(frozen=True)
class Device:
    """A device, and the ways to it, as they were while a policy served.

    `took`: seconds of a step, over those of its profile.
    """

    took: Callable[[Batch], float]
    costs: Simulation
    ways: WaysTook | None

    @classmethod
    def of(cls, session: Session, report: Report, watch: Watch, took: Took) -> Device:
        costs = watch.told().costs
        if not isinstance(session, ClusterSession):
            return cls(took.stretch(report.start), costs, None)
        ways = session.ways.told(report.start)
        return cls(took.stretch(report.start), costs.model_copy(update={"call_s": 0.0}), ways)

    def simulation(self) -> Mapping[str, Any]:
        """What `simulate` has to be told of it."""
        return {"took": self.took, "device": self.costs, "ways": self.ways}


def beside(session: Session, policy: str, report: Report, by_model: ByModel, device: Device) -> dict[str, Any]:
    """A served report with what the simulator says, by the profiles and of the device as it was meanwhile."""
    config = session.config
    same = dataclasses.replace(session.prepared, requests=session.prepared.requests[: report.submitted])

    def simulated(**observed: Any) -> dict[str, Any]:
        parts = ByModel(config)
        return record(config, policy, simulate(same, policy, [parts], **observed), parts)

    real, plain = record(config, policy, report, by_model), simulated()
    if device.ways is not None:
        real["cluster"]["ways_s"] = device.ways.to_dict()
    as_observed = simulated(**device.simulation())
    return {
        **real,
        "simulated": plain,
        "simulated_as_observed": as_observed,
        "error": dataclasses.asdict(error(Outcome.of(real), Outcome.of(plain))),
        "error_as_observed": dataclasses.asdict(error(Outcome.of(real), Outcome.of(as_observed))),
    }


def on_time(session: Session, policy: str, device: Device) -> int:
    """How many requests a policy keeps on a device as it was, simulated."""
    return simulate(session.prepared, policy, **device.simulation()).counts["on_time"]


def same_device_table(records: Sequence[dict[str, Any]]) -> Table:
    """Requests on time, a row a policy, a column for the device as it was while each served."""
    names = [entry["policy"] for entry in records]
    table = new_table("the same device for all: requests on time, simulated", "policy", [*names, "share"])
    for entry in records:
        kept = entry["on_time_on_device_of"]
        share = sum(kept.values()) / (len(kept) * entry["counts"]["submitted"])
        table.add_row(entry["policy"], *(str(kept[name]) for name in names), f"{share:.1%}")
    table.caption = "a column is the device as it was while that policy served; share: of all columns"
    table.caption_justify = "left"
    return table


def say_errors(records: Sequence[dict[str, Any]]) -> None:
    """Say how far the simulator was off, and how far where it knows how fast the device was."""
    rows = []
    for entry in records:
        served, policy = Outcome.of(entry), entry["policy"]
        rows.append((policy, served, Outcome.of(entry["simulated"])))
        rows.append((f"{policy}, as observed", served, Outcome.of(entry["simulated_as_observed"])))
    console.print(errors_table("how far the simulator was off", "policy", rows))


def explain(records: Sequence[dict[str, Any]]) -> None:
    """Say where the device was not as fast as its profile, and what ways to instances and back took."""
    for entry in records:
        busy = sum(entry["busy_s"].values())
        profiled = sum(seconds / entry["profile_error"][stage] for stage, seconds in entry["busy_s"].items())
        if busy and abs(busy / profiled - 1) > 0.05:
            again = entry["simulated_as_observed"]["goodput_rps"]
            console.print(
                f"{entry['policy']}: steps took {busy / profiled:.2f} times what the profiles say; "
                f"simulated as observed: {again:.2f}/s",
            )
        ways = entry.get("cluster", {}).get("ways_s", {})
        told = [
            f"{seconds['p50'] * 1e3:.1f} ms {way} (p99 {seconds['p99'] * 1e3:.0f})" for way, seconds in ways.items()
        ]
        if told:
            console.print(f"{entry['policy']}: a request's ways took {', '.join(told)}")
