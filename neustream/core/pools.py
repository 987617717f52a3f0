"""The pools of a scheduler, by name."""

from __future__ import annotations

from neustream.core.pool_state import PoolState


class Pools(dict[str, PoolState]):
    """They are as they are now once they have caught up with steps that stand (see `Standing`)."""

    def catch_up(self) -> None:
        """Let all jobs be where they are by now."""
        for state in self.values():
            if state.standing is not None:
                state.standing.catch_up()

    def stand_no_more(self, state: PoolState) -> None:
        """The same; what comes of a pool's steps is not certain any more."""
        self.catch_up()
        state.standing = None

    def none_stands(self) -> None:
        """The same of all pools."""
        self.catch_up()
        for state in self.values():
            state.standing = None
