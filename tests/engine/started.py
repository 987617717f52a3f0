"""Engines in real time for tests, and how long to wait for them."""

from __future__ import annotations

from toys import engine, table

from neustream import (
    ThreadExecutor,
    WallClock,
)

SOON = 30  # seconds to wait for what must come at once, so that a fault does not hang the tests
TOY = {"draw": table("draw", 0.10, 0.15), "decode": table("decode", 0.05)}
ONE = {"s": table("s", 1.0)}


def started(graph, module, policy=None, workers=1):
    """A started engine in real time, whose stage "s" is `module`."""
    modules, devices = [{"s": module}] * workers, ["cpu"] * workers
    executor = ThreadExecutor(modules, devices)
    return engine(graph, ONE, policy, workers=workers, executor=executor, clock=WallClock()).start()
