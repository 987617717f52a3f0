"""Which KV blocks live jobs hold in a scheduler's pools, and what is kept of those they lost."""

from __future__ import annotations

from collections.abc import Mapping

from neustream.core.entry import Entry
from neustream.core.node import Stage
from neustream.core.pool_state import PoolState


class Holding:
    """The blocks of jobs, by the pools that serve their stages."""

    def __init__(self, pool_of: Mapping[str, PoolState]) -> None:
        self._pool_of = pool_of

    def set_tokens(self, job: Entry, tokens: float) -> None:
        """Let `job` hold the KV blocks of so many tokens, where its stage has a cache.

        One whose next stage is away keeps those of the pool that it comes from.
        """
        if job.stage is None:
            return
        state = self._pool_of.get(job.stage.name)
        if state is None and job.num_blocks:
            model = job.stage.model
            state = next(state for state in self._pool_of.values() if model in state.blocks)
        if state is not None:
            state.set_tokens(job, tokens)

    def put_aside(self, job: Entry, stage: Stage, tokens: float) -> float:
        """Keep so many tokens of a job that lost its blocks in the host's memory.

        Returns how many of them `stage`, which fills its cache again, need not compute: none where
        there is no room, where that is another pool's, or if nothing would be left to compute.
        """
        state = self._pool_of.get(stage.name)
        blocks = None if state is None else state.blocks_at(stage)
        if blocks is None or job.stage is None or self._pool_of.get(job.stage.name) is not state:
            return 0.0
        if not 0 < tokens < stage.size_of(job) or not blocks.put_aside(job, tokens):
            return 0.0
        return tokens
