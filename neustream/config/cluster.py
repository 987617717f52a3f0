"""The section `cluster`: instances, rules, network, failures and faults of a cluster, simulated or served."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from neustream.config.fields import Seconds, Section

MOST_INSTANCES = 100_000
MOST_SERVED = 256
"""Of one head."""
ADDRESS = r"auto|[^\s:/]+:\d{1,5}"
"""Of a Ray cluster."""
NAME = r"[\w.-]+"
"""Of a cluster whose instances outlive its process."""
WHOLE = "whole"
"""The kind of instances that are all alike."""

Rule = dict[str, dict[str, Any]]
"""Rules by name, with their parameters."""
Count = Annotated[int, Field(ge=0, le=MOST_INSTANCES)]
Wait = Annotated[float, Field(ge=0, le=1e9)]


def _kind_of(value: Any) -> str:
    """The tag of the branch that a value belongs to: sections by name, or one value for all."""
    return "by name" if isinstance(value, Mapping) else "for all"


class InstanceConfig(Section):
    """Instances of one kind: how many there are from the start, and on what device.

    `stages`: that they serve, all by default; of several models as `model.stage`, or `model` for
    all of it. `profiles`: of their device, if that is not the one of the model; of several models
    by name. `load_s`: from being ordered to being there; None: as their profiles say.
    `memory_bytes`: room for weights, which a placement has to fit. `resources`: what one takes of
    Ray's machines beside a GPU or CPU, by Ray's names.
    """

    count: Count = 1
    stages: list[str] | None = Field(default=None, min_length=1)
    profiles: (
        Annotated[Annotated[Path, Tag("for all")] | Annotated[dict[str, Path], Tag("by name")], Discriminator(_kind_of)]
        | None
    ) = None
    load_s: Wait | None = None
    memory_bytes: Annotated[float, Field(gt=0)] | None = None
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


class NetworkConfig(Section):
    """Between a head and instances: seconds of a message, bytes per second, share that is lost.

    `report_s`: how often an instance tells how it is, at most. `token_bytes`: of a token in the KV
    cache; with it, texts move with their KV cache where that is quicker than to prefill them anew.
    `state_bytes`: what a request that has begun carries along beside that.
    """

    delay_s: Wait = 0.0007
    bandwidth: Annotated[float, Field(gt=0)] = 3e8
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    report_s: Wait = 0.05
    token_bytes: Wait = 0.0
    state_bytes: Annotated[float, Field(ge=0, le=1e15)] = 0.0


class FailureConfig(Section):
    """What a head does about failures; see the cluster's README. Seconds."""

    suspect_s: Seconds = 1.5
    dead_s: Seconds = 5.0
    send_s: Seconds = 2.0
    move_timeout_s: Seconds = 5.0
    restarts: Annotated[int, Field(ge=0)] = 2
    deaths: Annotated[int, Field(ge=1)] = 2
    drain_s: Seconds = 60.0
    patience_s: Seconds = 60.0
    move_s: Seconds = 0.1
    scale_s: Seconds = 1.0
    snapshot_s: Seconds | None = None

    @model_validator(mode="after")
    def _ordered(self) -> FailureConfig:
        if self.dead_s < self.suspect_s:
            raise ValueError(f"dead_s {self.dead_s:g} is less than suspect_s {self.suspect_s:g}")
        return self


class FaultConfig(Section):
    """What happens to an instance, by its number from 0, at `at_s` for `for_s` seconds.

    `head`: the head is gone, with all it knew, and then another one begins.
    """

    at_s: Wait
    instance: Annotated[int, Field(ge=0)] | None = None
    kind: Literal["crash", "hang", "slow", "partition", "head"]
    for_s: Seconds | None = None
    factor: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0

    @model_validator(mode="after")
    def _of_somebody(self) -> FaultConfig:
        if self.kind == "head" and self.for_s is None:
            raise ValueError("kind: head needs for_s: after so long another head begins")
        if (self.instance is None) != (self.kind == "head"):
            of = "of no instance" if self.kind == "head" else "of an instance: give its number"
            raise ValueError(f"kind: {self.kind} is {of}")
        if ("factor" in self.model_fields_set) != (self.kind == "slow"):
            needs = "needs a factor" if self.kind == "slow" else f"has no factor, got {self.factor:g}"
            raise ValueError(f"kind: {self.kind} {needs}")
        if self.kind == "crash" and self.for_s is not None:
            raise ValueError(f"kind: crash is for good, got for_s {self.for_s:g}; partition and hang come back")
        return self

    @property
    def seconds(self) -> float:
        """How long; inf: for good."""
        return math.inf if self.for_s is None else self.for_s


class HeadConfig(Section):
    """What a head decides by, and what its instances run on where they are real.

    `router`: several are compared, as policies are. `mover` and `scaler`: one each, or none.
    `engine`: None: it can only be simulated. `address`: of a Ray cluster, "auto" or "host:port";
    None: a Ray of its own on this machine.
    """

    router: Rule = Field(default={"slack": {}}, min_length=1)
    mover: Rule = Field(default_factory=dict, max_length=1)
    scaler: Rule = Field(default_factory=dict, max_length=1)
    failure: FailureConfig = FailureConfig()
    engine: Literal["ray"] | None = None
    address: str | None = None

    @field_validator("router", "mover", "scaler", mode="before")
    @classmethod
    def _by_name(cls, raw: Any) -> Any:
        """A name alone is a rule without parameters."""
        if isinstance(raw, str):
            return {raw: {}}
        if isinstance(raw, dict):
            return {name: {} if given is None else given for name, given in raw.items()}
        return raw

    @model_validator(mode="after")
    def _address_of_an_engine(self) -> HeadConfig:
        if self.address is not None and not re.fullmatch(ADDRESS, self.address):
            raise ValueError(f"address must be auto or host:port, got {self.address!r}")
        if self.address is not None and self.engine is None:
            raise ValueError(f"address {self.address!r} is of an engine: give engine: ray, too")
        return self


class FrontConfig(HeadConfig):
    """Instances behind a server's front. `instances`: so many at first, all with all models.

    `name`: instances outlive the front's process, for `lease_s` seconds, and are there for the next
    one of the same name and models; None: they end with it.
    """

    instances: Annotated[int, Field(ge=1, le=MOST_SERVED)]
    router: Rule = Field(default={"slack": {}}, min_length=1, max_length=1)
    engine: Literal["ray"] = "ray"
    name: str | None = None
    lease_s: Seconds | None = None

    @model_validator(mode="after")
    def _name_of_lasting_instances(self) -> FrontConfig:
        if self.name is None and self.lease_s is not None:
            raise ValueError(f"lease_s {self.lease_s:g} is of instances with a name: give name, too")
        if self.name is None:
            return self
        if not re.fullmatch(NAME, self.name):
            raise ValueError(f"name must be letters, digits, '-', '_' and '.', got {self.name!r}")
        if self.address is None:
            raise ValueError(f"name {self.name!r}: a Ray of its own ends with the front: give address, too")
        return self


class ClusterConfig(HeadConfig):
    """Instances behind a head.

    `instances`: so many, all alike, or kinds by name. `network` and `faults` are of simulations.
    `weights_bytes`: by stage, for placements.
    """

    instances: Annotated[
        Annotated[Count, Tag("for all")] | Annotated[dict[str, InstanceConfig], Tag("by name")],
        Discriminator(_kind_of),
    ]
    network: NetworkConfig = NetworkConfig()
    faults: list[FaultConfig] = Field(default_factory=list)
    weights_bytes: dict[str, Annotated[float, Field(ge=0, le=1e15)]] = Field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, InstanceConfig]:
        """The kinds of instances by name."""
        if isinstance(self.instances, int):
            return {WHOLE: InstanceConfig(count=self.instances)}
        return self.instances

    @model_validator(mode="after")
    def _some(self) -> ClusterConfig:
        count = sum(kind.count for kind in self.kinds.values())
        if not 1 <= count <= MOST_INSTANCES:
            raise ValueError(f"instances: {count} in all; there must be 1 to {MOST_INSTANCES}")
        for fault in self.faults:
            if fault.instance is not None and fault.instance >= count:
                raise ValueError(f"faults: no instance {fault.instance}; there are {count}, numbered from 0")
        return self
