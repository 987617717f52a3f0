"""Adapters whose scales stock calls put into a shared model, and take out again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

SCALED = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Arguments that may have a `scale` of adapters."""
DRIFT = 1e-6
"""How far off a scale may be that was multiplied and divided."""


def scales_of(model: Any) -> list[dict[str, float]]:
    """The scales of a model's adapters, a dict for each layer of theirs."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return [module.scaling for module in modules if isinstance(module.__dict__.get("scaling"), dict)]


def scaled(named: Mapping[str, Any]) -> bool:
    """Whether arguments have a scale for adapters."""
    given = (named.get(name) for name in SCALED)
    return any(isinstance(value, Mapping) and "scale" in value for value in given)


@contextlib.contextmanager
def kept(scales: Sequence[dict[str, float]]) -> Iterator[None]:
    """Have them as they are afterwards, bit for bit; but for what somebody else changed meanwhile."""
    before, done = [dict(one) for one in scales], False
    try:
        yield
        done = True
    finally:
        for now, one in zip(scales, before, strict=True):
            drifted = all(math.isclose(now[name], one.get(name, 0.0), rel_tol=DRIFT) for name in now)
            if drifted or not done:
                now.update(one)
