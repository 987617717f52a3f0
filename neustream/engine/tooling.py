"""What tools need to be served or simulated: pools without a policy, profiles, executors."""

from __future__ import annotations

from collections.abc import Iterable

from neustream.core.graph import Stage, Tool
from neustream.core.policy import Pool
from neustream.core.profile import GuessedProfile, LatencyProfile, TableProfile
from neustream.engine.executor import Executor
from neustream.engine.tools import ToolExecutor


def pools_of(stages: Iterable[Stage]) -> list[Pool]:
    """A pool for each tool, of its own name, with its concurrency."""
    return [
        Pool(f"tool {stage.name}", (stage.name,), concurrency=_tool(stage).concurrency)
        for stage in stages
    ]


def profiles_of(stages: Iterable[Stage]) -> dict[str, LatencyProfile]:
    """What tools are expected to take until calls of them were seen, by stage."""
    return {
        stage.name: GuessedProfile(TableProfile(stage.name, [1], [_tool(stage).expect_s]))
        for stage in stages
    }


def executors_of(stages: Iterable[Stage]) -> dict[str, Executor]:
    """What calls each tool, by the name of its pool."""
    return {f"tool {stage.name}": ToolExecutor({stage.name: _tool(stage)}) for stage in stages}


def _tool(stage: Stage) -> Tool:
    assert stage.tool is not None
    return stage.tool
