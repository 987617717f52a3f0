"""The KV cache of a language model in blocks: who holds how many, who fits, who must give way.

`BlockPool` answers; the scheduler acts on the answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.record import record
from neustream.errors import GraphError, RequestError


@dataclass(frozen=True, slots=True)
class KVCache:
    """`num_blocks` of `block_size` tokens each; a job holds whole blocks.

    A job that leaves the prefill and decode stages of its model, or ends, gives its blocks back.
    With `host_blocks`, what a preempted job has computed is kept aside, in the host's memory, while
    there is room for so many blocks: it goes on from there, and computes nothing again.

    Raises:
        GraphError: one of the first two numbers is less than 1, or the third less than 0.
    """

    num_blocks: int
    block_size: int = 16
    host_blocks: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_blocks", 1), ("block_size", 1), ("host_blocks", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise GraphError(
                    f"KV cache: {name} must be a whole number of {least} or more, got {value!r}"
                )

    @property
    def capacity(self) -> int:
        """Tokens that all blocks hold."""
        return self.num_blocks * self.block_size

    def blocks_of(self, tokens: float) -> int:
        """Blocks that so many tokens fill."""
        return -int(-tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Ticket:
    """Blocks that are reserved for a request that is on its way here."""

    number: int
    pool: str
    model: str
    blocks: int


@record()
class Allocation:
    """Who runs in a step, with the sizes they get; who loses their blocks to it; who never fits."""

    jobs: tuple[Job, ...]
    sizes: tuple[float, ...]
    preempted: tuple[Job, ...] = ()
    too_large: tuple[Job, ...] = ()


class BlockPool:
    """The blocks of one model's KV cache in one pool. Jobs of other models have no part in it."""

    def __init__(self, pool: str, model: str, cache: KVCache) -> None:
        self.pool = pool
        self.model = model
        self.cache = cache
        self.used = 0
        self.host_used = 0
        self._tickets: dict[int, Ticket] = {}
        self._next_ticket = 1

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"pool {self.pool!r}, model {self.model!r}"

    @property
    def reserved(self) -> int:
        """Blocks kept for requests that are on their way here."""
        return sum([ticket.blocks for ticket in self._tickets.values()])

    @property
    def free(self) -> int:
        """Blocks that nobody holds and that are not reserved."""
        return max(self.cache.num_blocks - self.used - self.reserved, 0)

    def set_tokens(self, job: Job, tokens: float) -> None:
        """Let `job` hold the blocks of so many tokens, no more and no fewer; none aside."""
        blocks = self.cache.blocks_of(tokens)
        self.used += blocks - job.num_blocks
        job.num_blocks = blocks
        self.host_used -= job.host_blocks
        job.host_blocks = 0

    def put_aside(self, job: Job, tokens: float) -> bool:
        """Keep so many tokens of a job without blocks in the host's memory; False: no room."""
        blocks = self.cache.blocks_of(tokens)
        if blocks > self.cache.host_blocks - self.host_used:
            return False
        self.host_used += blocks
        job.host_blocks = blocks
        return True

    def need(self, job: Job, size: float) -> int:
        """Blocks that `job` needs beyond those it holds to do `size` units of its step."""
        stage = job.stage
        if stage is None or not stage.caches:
            return 0
        return self.cache.blocks_of(_kept(job, stage, size)) - job.num_blocks

    # -- reservations -----------------------------------------------------------------------------

    def reserve(self, tokens: float) -> Ticket:
        """Keep blocks for a request that is on its way; RequestError if they are not free."""
        if not 0 <= tokens < math.inf:
            raise RequestError(
                f"{self.name}: tokens to reserve must be a number >= 0, got {tokens!r}"
            )
        blocks = self.cache.blocks_of(tokens)
        if blocks > self.free:
            raise RequestError(
                f"{self.name}: cannot reserve {blocks} blocks ({tokens:g} tokens), "
                f"{self.free} of {self.cache.num_blocks} are free"
            )
        ticket = Ticket(self._next_ticket, self.pool, self.model, blocks)
        self._next_ticket += 1
        self._tickets[ticket.number] = ticket
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Give reserved blocks back; RequestError if they were given back before."""
        if self._tickets.get(ticket.number) != ticket:
            raise RequestError(f"{self.name}: {ticket} is not reserved, or was released before")
        del self._tickets[ticket.number]

    # -- a step -----------------------------------------------------------------------------------

    def fits(self, job: Job) -> bool:
        """Whether the whole cache suffices for the job's next step."""
        stage = job.stage
        if stage is None or not stage.caches:
            return True
        return _kept(job, stage, job.size) <= self.cache.capacity

    def misfit(self, job: Job) -> str:
        """Why a job that does not fit cannot run."""
        stage, cache = job.stage, self.cache
        assert stage is not None  # elsewhere all fit
        tokens = _kept(job, stage, job.size)
        return (
            f"request {job.id!r}: stage {stage.name!r} needs KV cache for {tokens:.0f} tokens at "
            f"once, that of model {self.model!r} in pool {self.pool!r} has {cache.capacity} "
            f"({cache.num_blocks} blocks of {cache.block_size})"
        )

    def allocate(
        self, jobs: Sequence[Job], sizes: Sequence[float], others: Iterable[Job]
    ) -> Allocation:
        """Blocks for a step of `jobs`, in order of importance; `others` are all jobs of the model.

        Jobs that the whole cache does not suffice for are told apart: they are to end, so their
        blocks count as free. A job without blocks never preempts. A job with blocks that needs more
        preempts the least important holder: first those that are not in the step, the latest first,
        then the step's own from the end; itself included.
        """
        if self.suffice(jobs, sizes):
            return Allocation(tuple(jobs), tuple(sizes))
        wanted: list[_Wanted] = []
        too_large: list[Job] = []
        for job, size in zip(jobs, sizes, strict=True):
            if self.fits(job):
                wanted.append(_Wanted(job, size, self.need(job, size)))
            else:
                too_large.append(job)
        free = self.free + sum([job.num_blocks for job in too_large])
        preempted: dict[Job, None] = {}
        if sum([want.need for want in wanted]) > free:
            holders = _victims([want.job for want in wanted], others, too_large)
            wanted, preempted = _seat(wanted, free, holders)
        return Allocation(
            tuple([want.job for want in wanted]),
            tuple([want.size for want in wanted]),
            tuple(preempted),
            tuple(too_large),
        )

    def suffice(self, jobs: Sequence[Job], sizes: Sequence[float]) -> bool:
        """Whether there are blocks for all, as there nearly always are."""
        cache = self.cache
        capacity, block_size = cache.capacity, cache.block_size
        need = 0
        for job, size in zip(jobs, sizes, strict=True):
            stage = job.stage
            if stage is None or stage.phase == "step":
                continue
            tokens = whole = size  # a decode cannot be parted
            if stage.phase != "decode":
                tokens += job.computed
                whole = job.computed + job.size
            if whole > capacity:
                return False
            if not 0 <= job.num_blocks * block_size - tokens < block_size:
                need += -int(-tokens // block_size) - job.num_blocks
        return need <= 0 or need <= self.free


def _kept(job: Job, stage: Stage, size: float) -> float:
    """Tokens of a job in the cache after `size` units of its step: of a prompt all so far."""
    return size if stage.phase == "decode" else job.computed + size


class _Wanted(NamedTuple):
    """A job of a step, what it is to do, and the blocks that it lacks for it."""

    job: Job
    size: float
    need: int


def _seat(
    wanted: Sequence[_Wanted], free: int, victims: list[Job]
) -> tuple[list[_Wanted], dict[Job, None]]:
    """What of `wanted` there are blocks for, and which of `victims` lose theirs to it."""
    seated: list[_Wanted] = []
    preempted: dict[Job, None] = {}
    for want in wanted:
        job = want.job
        while want.need > free and job.num_blocks and job not in preempted:
            victim = victims.pop()
            preempted[victim] = None
            free += victim.num_blocks
        if want.need <= free and job not in preempted:
            free -= want.need
            seated.append(want)
    return seated, preempted


def _victims(chosen: Sequence[Job], others: Iterable[Job], too_large: Sequence[Job]) -> list[Job]:
    """Jobs that hold blocks, the most important first, without those that are to end."""
    holders = [job for job in chosen if job.num_blocks]
    step = {*chosen, *too_large}
    outside = []
    for job in others:
        if job.num_blocks and job.status == "waiting" and job not in step:
            outside.append(job)
    outside.sort(key=lambda job: job.joined_at)
    return holders + outside
