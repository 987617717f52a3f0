"""The shapes of calls that a pipeline was asked for: few, the least recently used forgotten."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial

from neustream.backends.diffusers.modules import graph_of
from neustream.backends.diffusers.replica import Dimensions
from neustream.core.graph import Graph, Stage
from neustream.core.job import Job
from neustream.core.profile import (
    LatencyProfile,
    TableProfile,
    UnitProfile,
    guessed,
    unmeasured,
)
from neustream.errors import RequestError

KINDS = 16
"""Kinds of calls that are remembered, for each shape."""


@dataclass(eq=False)
class Shape:
    """Calls whose steps can share batches.

    Args:
        stages: their names by role.
        rows, samples: of a request that counts as one unit of the profiles.
        measured: by role, if they were; else profiles are guesses.
        open: requests under way.
    """

    dimensions: Dimensions
    graph: Graph
    stages: Mapping[str, str]
    rows: int
    samples: int
    measured: Mapping[str, LatencyProfile] | None = None
    open: int = 0
    profiles: Mapping[str, LatencyProfile] = field(default_factory=dict)
    preview: Graph | None = None
    """What previews go through, once there was one."""

    @property
    def all_stages(self) -> list[str]:
        """The names of its stages, with that of previews."""
        return [*self.stages.values(), *([] if self.preview is None else [self.preview.name])]

    @property
    def files(self) -> dict[str, str]:
        """The file name of each stage's profile."""
        return {stage: f"{role}@{self.dimensions.label}" for role, stage in self.stages.items()}


class Shapes:
    """The shapes of one pipeline. Its owner has the lock.

    Args:
        name: of the model; stages are called by it.
        batches: the most requests in a step, by role.
        most: how many shapes are kept.
    """

    def __init__(self, name: str, batches: Mapping[str, int], most: int) -> None:
        self._prefix = f"{name}/" if name else ""
        self._batches = batches
        self._most = most
        self._shapes: OrderedDict[Hashable, Shape] = OrderedDict()
        self._kinds: OrderedDict[Hashable, tuple[Shape, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._shapes)

    def of_kind(self, kind: Hashable) -> tuple[Shape, int] | None:
        """The shape of calls of a kind, and their rows; None if it is not known."""
        found = self._kinds.get(kind)
        if found is not None:
            self._kinds.move_to_end(kind)
            self._shapes.move_to_end(found[0].dimensions.key)
        return found

    def graphs(self) -> list[Graph]:
        """Those of all shapes."""
        return [shape.graph for shape in self._shapes.values()]

    def measured(self, stage: str) -> bool:
        """Whether a stage's profile was measured."""
        for shape in self._shapes.values():
            if stage in shape.stages.values():
                return shape.measured is not None
        return False

    def get(self, dimensions: Dimensions) -> Shape | None:
        """The shape of calls with these dimensions."""
        return self._shapes.get(dimensions.key)

    def note(self, kind: Hashable, shape: Shape, rows: int) -> None:
        """Calls of a kind have a shape, with so many rows."""
        self._kinds[kind] = shape, rows
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KINDS * self._most:
            self._kinds.popitem(last=False)

    def make(self, dimensions: Dimensions, roles: list[str], rows: int, samples: int) -> Shape:
        """A new shape, with its graph; not kept yet."""
        label = dimensions.label
        names = {role: f"{self._prefix}{role}@{label}" for role in roles}
        sizes: dict[str, Callable[[Job], float]] = {
            "encode": partial(share_of, "samples", samples),
            "denoise": partial(share_of, "rows", rows),
            "decode": partial(share_of, "samples", samples),
        }
        stages = {role: Stage(name, max_batch=self._batches[role], size=sizes[role]) for role, name in names.items()}
        graph = graph_of(self._prefix + label, stages)
        return Shape(dimensions, graph, names, rows, samples)

    def preview(self, shape: Shape) -> tuple[Graph, LatencyProfile]:
        """The graph of a shape's previews, and its profile: to begin with, that of its decoder."""
        name = f"{self._prefix}preview@{shape.dimensions.label}"
        size = partial(share_of, "samples", shape.samples)
        graph = Graph(name, Stage(name, max_batch=self._batches["decode"], size=size))
        return graph, guessed(_table(shape.profiles["decode"]))

    def keep(self, shape: Shape) -> None:
        """Serve a new shape."""
        self._shapes[shape.dimensions.key] = shape

    def surplus(self) -> Shape | None:
        """The shape to forget so that another one has room; None if there is room.

        RequestError if requests of all of them are under way.
        """
        if len(self._shapes) < self._most:
            return None
        for shape in self._shapes.values():
            if not shape.open:
                return shape
        raise RequestError(f"requests of {len(self._shapes)} shapes are under way, and max_shapes is {self._most}")

    def forget(self, shape: Shape) -> None:
        """Serve a shape no more."""
        del self._shapes[shape.dimensions.key]
        for kind in [kind for kind, (known, _) in self._kinds.items() if known is shape]:
            del self._kinds[kind]

    def nearest(self, dimensions: Dimensions, rows: int) -> Shape | None:
        """The shape whose steps cost most nearly as much; a measured one, if there is any."""
        wanted = math.log(dimensions.elements * rows)

        def distance(shape: Shape) -> tuple[bool, float]:
            cost = math.log(shape.dimensions.elements * shape.rows)
            return shape.measured is None, abs(wanted - cost)

        return min(self._shapes.values(), key=distance, default=None)


def predicted(near: Shape, new: Shape) -> dict[str, LatencyProfile]:
    """Profiles of a new shape by role, from those of a known one.

    Steps and decodes are taken to cost as much for each element of a row as they do there,
    encodings as much for each sample. Attention costs more than that, overheads less: what is wrong
    is corrected while steps run.
    """
    elements = new.dimensions.elements / near.dimensions.elements
    ratios = {
        "encode": new.samples / near.samples,
        "denoise": elements * new.rows / near.rows,
        "decode": elements * new.samples / near.samples,
    }
    return {role: guessed(_table(near.profiles[role]), ratios[role]) for role in new.stages}


def from_nothing(shape: Shape, batches: Mapping[str, int]) -> dict[str, LatencyProfile]:
    """Profiles of a shape by role where nothing is known of any."""
    return {role: unmeasured(role, batches[role]) for role in shape.stages}


def _table(profile: LatencyProfile) -> TableProfile:
    table = profile.table if isinstance(profile, UnitProfile) else profile
    assert isinstance(table, TableProfile)
    return table


def share_of(of: str, usual: int, job: Job) -> float:
    """How many times as many samples or rows as usual a request has: the size of its steps."""
    count: int = job.params[of]
    return count / usual
