"""What a pool, its KV caches and its policy must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neustream.core.kv_cache import KVCache
from neustream.core.policy import Policy, Pool
from neustream.errors import GraphError, PolicyError, shown


def check_pool(pool: Pool) -> None:
    """GraphError for a pool that cannot be."""
    name = f"pool {pool.name!r}"
    if pool.workers < 1:
        raise GraphError(f"{name}: workers must be 1 or more, got {pool.workers}")
    _check_caches(pool)
    if pool.kv_caches and pool.workers > 1:
        raise GraphError(f"{name}: a KV cache is one worker's; {pool.workers} need a pool each")
    count = pool.concurrency
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise GraphError(f"{name}: concurrency must be 1 or more, got {shown(count)}")
    if pool.workers > 1 or pool.sticky or pool.kv_caches:
        raise GraphError(
            f"{name}: concurrency is for pools without a policy; workers, sticky and kv_caches do "
            "not go with it"
        )


def _check_caches(pool: Pool) -> None:
    """GraphError for KV caches that are none, or that are no model's."""
    name = f"pool {pool.name!r}"
    if not isinstance(pool.kv_caches, Mapping):
        raise GraphError(
            f"{name}: kv_caches must map names of models to KVCache, got {shown(pool.kv_caches)}"
        )
    for model, cache in pool.kv_caches.items():
        if not isinstance(model, str) or not model:
            raise GraphError(f"{name}: kv_caches need names of models, got {shown(model)}")
        if not isinstance(cache, KVCache):
            raise GraphError(
                f"{name}: the KV cache of model {model!r} must be a KVCache, got {shown(cache)}"
            )


def check_policy(pool: Pool, policy: object) -> None:
    """PolicyError for what is no policy."""
    if isinstance(policy, type) or not callable(getattr(policy, "decide", None)):
        hint = f"; make one: {policy.__name__}()" if isinstance(policy, type) else ""
        raise PolicyError(
            f"pool {pool.name!r}: a policy is an object with decide(view), "
            f"got {shown(policy)}{hint}"
        )


def rules(pools: Sequence[Pool], policy: Policy | Mapping[str, Policy]) -> Sequence[Policy | None]:
    """The policy of each pool, None where none is asked; PolicyError if one lacks, or is too many.

    `policy`: one rule for all, or one for each by the pool's name.
    """
    if not isinstance(policy, Mapping):
        return [policy if pool.concurrency is None else None for pool in pools]
    for pool in pools:
        asked = pool.concurrency is None
        if asked and pool.name not in policy:
            raise PolicyError(f"pool {pool.name!r} has no policy; policies for: {sorted(policy)}")
        if not asked and pool.name in policy:
            raise PolicyError(
                f"pool {pool.name!r} has a concurrency: its jobs just start, and no policy is asked"
            )
    return [policy.get(pool.name) for pool in pools]
