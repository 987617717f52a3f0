"""The memory of a pool that jobs hold from step to step: blocks of a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.errors import GraphError


@dataclass(frozen=True, slots=True)
class Memory:
    """`blocks` of `block` units each (tokens of a KV cache); a job holds whole blocks.

    A job that leaves the stages that keep something (`Stage.keeps`), or ends, gives its blocks back.
    `foreign`: another engine hands the blocks out. The scheduler then neither refuses nor evicts for
    their sake; it is told (`Scheduler.rewind`, `Scheduler.free`).
    """

    blocks: int
    block: int = 16
    foreign: bool = False

    def __post_init__(self) -> None:
        for name in ("blocks", "block"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise GraphError(f"memory: {name} must be a whole number of 1 or more, got {value!r}")

    @property
    def units(self) -> int:
        """All of it, in units."""
        return self.blocks * self.block

    def blocks_of(self, units: float) -> int:
        """Blocks that so many units fill."""
        return -int(-units // self.block)
