"""The sans-I/O state machine around a policy: who is where, what may run, what each step changed.

Every method takes `now`; nothing here reads a clock, starts a thread or touches a tensor. Any loop
can drive it: the engine's, a simulator's, or a serving system's that owns its own queues:

    submit -> next_batch -> (plan) -> finish | fail | requeue -> pop_events -> next_batch ...

`cancel`, `hold`, `give` and `take` may come at any moment. A job ends exactly once, here or on the
scheduler that it was given to, and is then forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from neustream.core.asked import Asked
from neustream.core.batch import Batch
from neustream.core.carry import Carry, pack
from neustream.core.demand import Recent
from neustream.core.dispatch import Dispatch
from neustream.core.events import Event, Given, Update
from neustream.core.graph import Graph
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache, Ticket
from neustream.core.lives import Lives, Lost
from neustream.core.policy import Policy, Pool
from neustream.core.pool_checks import rules
from neustream.core.pool_state import PoolState
from neustream.core.pools import Pools
from neustream.core.profile import LatencyProfile
from neustream.core.step_ends import StepEnds
from neustream.core.step_times import StepTimes
from neustream.core.types import Request
from neustream.errors import (
    GraphError,
    NeustreamError,
    PolicyError,
    ProfileError,
    RequestError,
)


class Scheduler:
    """Holds the live jobs of some pools and asks a policy what each free worker does next.

    Args:
        pools: their stage names must not overlap.
        policy: one rule for all pools, or one for each by the pool's name. None is asked for pools
            with a `concurrency`.
        profiles: a latency profile for each stage of each pool.
        correct: whether steps that keep taking other times than their profile says correct it.
        away: latencies of stages that other schedulers serve, as seen from here. A job that gets to
            one waits for `give`.

    `times` knows what steps take, `recent` what requests asked for; `away` names the stages that
    others serve.

    Raises:
        GraphError: pools share a name or a stage.
        ProfileError: a stage has no profile.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        policy: Policy | Mapping[str, Policy],
        profiles: Mapping[str, LatencyProfile],
        *,
        correct: bool = False,
        away: Mapping[str, LatencyProfile] | None = None,
    ) -> None:
        self.times = StepTimes({**profiles, **(away or {})}, correct=correct)
        self.recent = Recent()
        self.away: set[str] = set(away or ())
        self._pools = Pools()
        self._lives = Lives(self._pools, self.times, self.recent, self.away)
        self._dispatch = Dispatch(self._lives, self.times, self.recent)
        self._ends = StepEnds(self._lives, self.times)
        for pool, rule in zip(pools, rules(pools, policy), strict=True):
            if pool.name in self._pools:
                raise GraphError(f"pools need different names, got {[p.name for p in pools]}")
            self._pools[pool.name] = PoolState(replace(pool, stages=()), rule)
            self.add(pool.name, {name: profiles.get(name) for name in pool.stages})

    def add(
        self,
        pool: str,
        profiles: Mapping[str, LatencyProfile | None],
        away: Mapping[str, LatencyProfile] | None = None,
    ) -> None:
        """Serve more stages on `pool` from now on (another resolution, another model).

        `away`: latencies of stages of theirs that other schedulers serve.
        """
        self._pools.catch_up()
        served = self._lives.pool_of
        if pool not in self._pools:
            raise GraphError(f"no pool {pool!r}; pools: {sorted(self._pools)}")
        for stage, profile in profiles.items():
            if stage in served:
                other = served[stage].pool.name
                raise GraphError(
                    f"stage {stage!r} of pool {pool!r} is served already, by pool {other!r}"
                )
            if profile is None:
                raise ProfileError(f"stage {stage!r} of pool {pool!r} has no profile")
        there = dict(away or {})
        here = {name: profile for name, profile in profiles.items() if profile is not None}
        self.times.add({**here, **there})
        self.away.update(there)
        self._pools[pool].open(profiles)
        served.update(dict.fromkeys(profiles, self._pools[pool]))

    def check_unused(self, pool: str, stages: Sequence[str]) -> None:
        """RequestError if `pool` does not serve all of `stages`, or a request has one ahead.

        Those that others serve may be forgotten too.
        """
        self._pools.catch_up()
        if pool not in self._pools:
            raise RequestError(f"no pool {pool!r}; pools: {sorted(self._pools)}")
        served = {*self._pools[pool].pool.stages, *self.away}
        for stage in stages:
            if stage not in served:
                raise RequestError(f"pool {pool!r} does not serve stage {stage!r}")
            for job in self.jobs.values():
                if stage in job.request.graph.stages:
                    raise RequestError(f"stage {stage!r} is needed by request {job.id!r}")

    def remove(self, pool: str, stages: Sequence[str]) -> None:
        """Forget stages of `pool`, and all that was learnt of them; errors as of `check_unused`."""
        self.check_unused(pool, stages)
        self._pools[pool].close([stage for stage in stages if stage not in self.away])
        self.times.remove(stages)
        self.recent.remove(stages)
        self.away.difference_update(stages)
        for stage in stages:
            self._lives.pool_of.pop(stage, None)

    @property
    def pools(self) -> dict[str, Pool]:
        """The pools by name."""
        return {name: state.pool for name, state in self._pools.items()}

    @property
    def jobs(self) -> Mapping[str, Job]:
        """The live jobs by id, as they are now: ask for them anew once something happened."""
        self._pools.catch_up()
        return self._lives.jobs

    @property
    def busy(self) -> bool:
        """Whether there are any."""
        return bool(self._lives.jobs)

    @property
    def requests(self) -> list[str]:
        """The ids of the requests that are being served; `jobs` has their branches too."""
        return [job.id for job in self._lives.jobs.values() if not job.branch]

    @property
    def running(self) -> list[Batch]:
        """The steps under way."""
        self._pools.catch_up()
        return [batch for state in self._pools.values() for batch in state.running.values()]

    @property
    def kv_blocks(self) -> dict[str, tuple[int, int]]:
        """By language model, the KV blocks that are used, and all there are, over all pools."""
        self._pools.catch_up()
        found: dict[str, tuple[int, int]] = {}
        for state in self._pools.values():
            for model, blocks in state.blocks.items():
                used, of = found.get(model, (0, 0))
                found[model] = used + blocks.used, of + blocks.cache.num_blocks
        return found

    @property
    def kv_caches(self) -> dict[str, KVCache]:
        """The KV caches by language model, one worker's each."""
        found: dict[str, KVCache] = {}
        for state in self._pools.values():
            found |= state.pool.kv_caches
        return found

    @property
    def policies(self) -> dict[str, Policy]:
        """The policy of each pool that has one."""
        rules = {name: state.policy for name, state in self._pools.items()}
        return {name: rule for name, rule in rules.items() if rule is not None}

    @property
    def asked(self) -> Asked:
        """What policies were asked so far; another object once they are asked more."""
        return self._dispatch.asked

    # -- requests ---------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> Job:
        """Accept `request`; its job waits at its first stage. A live duplicate id is an error."""
        self._pools.catch_up()
        return self._lives.begin(request, now)

    def cancel(self, id: str, now: float) -> bool:
        """End a request on the caller's wish: at once if it waits, after its step if it runs.

        False if no such request is being served (unknown, or ended already).
        """
        self._pools.catch_up()
        return self._lives.end_soon(id, "cancelled", "cancelled by the caller", now)

    def give_up(self, id: str, reason: str, now: float) -> bool:
        """End a request as failed, because what it needs is gone; as `cancel` otherwise."""
        self._pools.catch_up()
        return self._lives.end_soon(id, "failed", reason, now)

    # -- jobs that move ---------------------------------------------------------------------------

    def hold(self, id: str, now: float) -> None:
        """Keep a request out of all steps; the event `Held` says when it waits and can be given."""
        self._pools.catch_up()
        self._lives.hold(self._lives.live(id, "hold"), now)

    def resume(self, id: str) -> None:
        """Let a held request run again; RequestError if it is not held."""
        self._pools.catch_up()
        self._lives.resume(self._lives.live(id, "resume"))

    def give(self, id: str, now: float) -> Carry:
        """Take a waiting, held or away request out, to be taken by another scheduler.

        Raises:
            RequestError: no such request is being served.
            PolicyError: it is in a step, or has forked: `hold` it and wait for the event.
        """
        self._pools.catch_up()
        job = self._lives.live(id, "give")
        if job.branch:
            raise PolicyError(f"give: {id!r} is a branch of request {job.root.id!r}; give that")
        if job.status == "forked":
            raise PolicyError(f"give: request {id!r} is in a par; hold it and wait for `Held`")
        if job.status == "running":
            raise PolicyError(f"give: request {id!r} is in a step; hold it and wait for `Held`")
        carry = pack(job, now)
        self._lives.forget(job)
        job.become("gone")
        self._lives.events.append(Given(id, now))
        return carry

    def take(
        self,
        carry: Carry,
        graph: Graph,
        now: float,
        *,
        cached: bool = False,
        ticket: Ticket | None = None,
    ) -> Job:
        """Accept a request in the middle of its way; its arrival and deadlines go on as they were.

        Args:
            graph: the same graph, as it is here.
            cached: whether what it kept in the KV cache came along; else it is computed anew.
            ticket: blocks that were reserved for it; given back in any case.

        Raises:
            RequestError: its id is being served here, or there are no blocks for what it kept.
            GraphError: the graph differs, or has stages that nobody serves.
        """
        self._pools.catch_up()
        if ticket is not None:
            self.release(ticket)
        return self._lives.adopt(carry, graph, now, cached)

    def reserve(self, pool: str, model: str, tokens: float) -> Ticket:
        """Keep KV blocks of a model for a request that is on its way.

        RequestError if they are not free.
        """
        state = self._pools.get(pool)
        if state is None:
            raise RequestError(f"reserve: no pool {pool!r}; pools: {sorted(self._pools)}")
        self._pools.none_stands()
        return state.blocks_of(model).reserve(tokens)

    def release(self, ticket: Ticket) -> None:
        """Give reserved blocks back; RequestError if they were given back before."""
        state = self._pools[ticket.pool]
        state.blocks_of(ticket.model).release(ticket)
        state.again = None  # there may be room for somebody who waits

    # -- steps ------------------------------------------------------------------------------------

    def next_batch(
        self, pool: str, now: float, worker: int = 0, instead: Policy | None = None
    ) -> Batch | None:
        """Ask the policy about a free worker; carry out its drops; return the step to run, if any.

        With None, `wake_at(pool)` says when to ask again if nothing else happens before. A policy
        that neither runs nor drops anything, nor names such a time, while jobs wait and nothing
        runs, would wait for ever: that is a PolicyError. `instead` decides in its place this once.
        Where no policy is asked, the job that came first runs alone.
        """
        return self._dispatch.next_batch(self._pools[pool], now, worker, instead)

    def waits(self, pool: str) -> bool:
        """Whether any job is at a stage of `pool`, or a plan is kept; else nothing can start."""
        state = self._pools[pool]
        return bool(state.plans) or not state.queues.empty

    def plan(self, batch: Batch, now: float, instead: Policy | None = None) -> None:
        """Decide, while `batch` runs, what its worker does next, as if it ended when it should.

        `next_batch` then starts that step without asking the policy, less the jobs that have ended
        by then, if the plan still holds (see `Plan.decision`). Waiting jobs that the policy drops
        end at once. A later plan replaces an earlier one.
        """
        self._pools.catch_up()
        self._dispatch.plan(self._pools[batch.pool], batch, now, instead)

    def planned(self, batch: Batch) -> bool:
        """Whether there is a plan for what follows `batch`, and nothing came up since."""
        plan = self._pools[batch.pool].plans.get(batch.worker)
        return plan is not None and plan.after == batch.id and not plan.changed

    def wake_at(self, pool: str) -> float | None:
        """When the policy asked to be asked again, after a `next_batch` that gave None."""
        return self._pools[pool].wake_at

    def begin(self, batch: Batch, now: float) -> Batch:
        """A step begins only now, because deciding took time; returns it with that start."""
        self._pools.none_stands()
        return self._pools[batch.pool].begin(batch, now)

    def finish(self, batch: Batch, updates: Sequence[Update | NeustreamError], now: float) -> None:
        """Take the results of a step, one per job in the same order, and move the jobs on.

        An error in place of an update fails that job alone, and so does anything that is no
        mapping. A wrong number of results fails all.
        """
        self._ends.finish(self._pools[batch.pool], batch, updates, now)

    def stands(self, batch: Batch) -> bool:
        """Whether a step under way is to run again, as far as its policy said beforehand."""
        again = self._pools[batch.pool].again
        return again is not None and again.jobs is batch.jobs

    def foresee(self, batch: Batch, steps: float) -> None:
        """Say that a step under way, and those of its jobs that follow, return nothing (`{}`).

        `steps`: how many in a row, this one first. Only who drives it may know, in a simulation.
        What such steps change is worked out together where it can be; nothing else changes by it.
        """
        self._dispatch.foresee(self._pools[batch.pool], batch, steps)

    def fail(self, batch: Batch, error: BaseException, now: float) -> None:
        """A step failed as a whole: all of its jobs end, with the error as the reason."""
        self._ends.fail(self._pools[batch.pool], batch, error, now)

    def requeue(self, batch: Batch, now: float, lost: Lost = "nothing") -> None:
        """A step was lost, with its worker maybe: its jobs wait again, from what survives.

        `lost`: "cache" sends jobs that keep something in the KV cache back to their prefill;
        "state" sends all of them back to the start of their graphs, whose outputs then come again
        from 0.
        """
        self._ends.requeue(self._pools[batch.pool], batch, now, lost)

    def pop_events(self) -> list[Event]:
        """What happened to requests and profiles since the last call, in order."""
        lives = self._lives
        if not lives.events:
            return []
        events, lives.events = lives.events, []
        return events
