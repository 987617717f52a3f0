"""Room in the KV caches of an instance that is kept for requests that may come."""

from __future__ import annotations

from neustream.core.kv_cache import Ticket
from neustream.core.scheduler import Scheduler
from neustream.errors import RequestError


class Room:
    """Tickets by request, each of a term. `name`: of the instance."""

    def __init__(self, name: str, scheduler: Scheduler) -> None:
        self._name = name
        self._scheduler = scheduler
        self._tickets: dict[str, tuple[int, Ticket | None]] = {}

    def keep(self, id: str, term: int, tokens: float) -> None:
        """Keep blocks for so many tokens; RequestError if they lack, or others wait for them."""
        if tokens:
            self._tickets[id] = term, self._ticket(tokens)

    def _ticket(self, tokens: float) -> Ticket | None:
        for name, pool in self._scheduler.pools.items():
            for model in pool.kv_caches:
                for job in self._scheduler.jobs.values():
                    stage = job.stage
                    if stage is not None and stage.phase == "prefill" and job.status == "waiting":
                        raise RequestError(f"prompts wait for KV blocks at instance {self._name!r}")
                return self._scheduler.reserve(name, model, tokens)
        return None

    def free(self, id: str, term: float = float("inf")) -> None:
        """What is kept for a request of this term or an older one is free again."""
        since, ticket = self._tickets.get(id, (0, None))
        if since > term:
            return
        self._tickets.pop(id, None)
        if ticket is not None:
            self._scheduler.release(ticket)

    def free_all(self) -> None:
        """All is free again."""
        for id in list(self._tickets):
            self.free(id)
