"""Whether the installed vLLM means by its queues what `scheduler.py` takes them to mean.

A scheduler of vLLM's own class, with the engine's settings and a few KV blocks, is driven by hand
for some steps before the first request: without a model, in about a millisecond. What comes out
differently is a BackendError at start that says what.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from neustream.backends.vllm import contract
from neustream.errors import BackendError, told

BLOCKS, SEATS, TOKENS = 64, 8, 2048
"""KV blocks, running requests and tokens of a step in the trial, at most."""
TOKEN = 7


class Trial:
    """A scheduler of vLLM's, and one step after the other.

    Args:
        kind: vLLM's class; args, kwargs: what the engine made its own scheduler with.
    """

    def __init__(self, kind: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = inspect.signature(Scheduler).bind(*args, **kwargs).arguments
        config = copy.copy(given["vllm_config"])
        config.kv_events_config = None  # no second publisher
        config.cache_config = _changed(config.cache_config, enable_prefix_caching=False)
        config.scheduler_config = _changed(
            config.scheduler_config, max_num_seqs=SEATS, max_num_batched_tokens=TOKENS
        )
        blocks = replace(given["kv_cache_config"], num_blocks=BLOCKS)
        given |= {"vllm_config": config, "kv_cache_config": blocks, "log_stats": False}
        self.scheduler = kind(**given)
        self.limit = contract.limit_name(self.scheduler)

    def add(self, *ids: str, prompt: int = 2) -> None:
        """Requests come, with prompts of so many tokens."""
        for id in ids:
            params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
            self.scheduler.add_request(Request(id, [TOKEN] * prompt, params, None))

    def generating(self, id: str) -> bool:
        """Whether the first token of a request is there."""
        made: int = self.scheduler.requests[id].num_output_tokens
        return made > 0

    def step(self) -> dict[str, int]:
        """One step, with its result; the tokens that were scheduled, by id."""
        scheduler = self.scheduler
        output = scheduler.schedule()
        tokens: dict[str, int] = output.num_scheduled_tokens
        ids = list(tokens)
        made = [[] if scheduler.requests[id].is_prefill_chunk else [TOKEN] for id in ids]
        places = {id: place for place, id in enumerate(ids)}
        result = ModelRunnerOutput(req_ids=ids, req_id_to_index=places, sampled_token_ids=made)
        scheduler.update_from_output(output, result)
        return tokens

    def blocks(self, id: str) -> Any:
        """The ids of the KV blocks that a request holds."""
        return self.scheduler.kv_cache_manager.get_block_ids(id)

    def running(self) -> list[str]:
        return [request.request_id for request in self.scheduler.running]


def _changed(config: Any, **values: Any) -> Any:
    """A copy of a section of vLLM's configuration with other values."""
    changed = copy.copy(config)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def running_request_is_kept_out(trial: Trial) -> str:
    """A running request that is not in `running` keeps what it has, and goes on later."""
    trial.add("a", "b", "c")
    trial.step()
    scheduler = trial.scheduler
    apart = scheduler.running.pop(1)
    had, computed = trial.blocks("b"), apart.num_computed_tokens
    tokens = trial.step()
    if set(tokens) != {"a", "c"}:
        return f"with b out of `running`, a step ran {sorted(tokens)} in place of a and c"
    scheduler.running.append(apart)
    if trial.blocks("b") != had or apart.num_computed_tokens != computed:
        return "a request that is out of `running` for one step loses what it has computed"
    tokens = trial.step()
    if tokens.get("b") != 1 or apart.num_computed_tokens != computed + 1:
        return "a request that comes back to `running` does not go on where it was"
    return ""


def waiting_request_is_kept_out(trial: Trial) -> str:
    """A waiting request that is not in `waiting` does not begin, and begins later."""
    trial.add("a", "b", "c")
    waiting = list(trial.scheduler.waiting)
    trial.scheduler.waiting.clear()
    trial.scheduler.waiting.extend([waiting[2], waiting[0]])
    tokens = trial.step()
    if list(tokens) != ["c", "a"]:
        return f"with c, a in `waiting`, a step began {list(tokens)}"
    trial.scheduler.waiting.extend([waiting[1]])
    tokens = trial.step()
    return "" if tokens.get("b") == 2 else "a request that comes back to `waiting` does not begin"


def tokens_end_the_step(trial: Trial) -> str:
    """`max_num_scheduled_tokens` bounds one step; who is first in `running` gets them."""
    trial.add("a", "b", "c")
    trial.step()
    scheduler = trial.scheduler
    full = scheduler.max_num_scheduled_tokens
    scheduler.running.reverse()
    scheduler.max_num_scheduled_tokens = 2
    tokens = trial.step()
    scheduler.max_num_scheduled_tokens = full
    if list(tokens) != ["c", "b"]:
        return f"of c, b, a in `running`, {list(tokens)} got the two tokens of a step"
    return "" if len(trial.step()) == 3 else "a step with few tokens changes the steps after it"


def seats_are_limited(trial: Trial) -> str:
    """Nobody begins beyond the limit of running requests."""
    trial.add("a")
    trial.step()
    scheduler = trial.scheduler
    full = getattr(scheduler, trial.limit)
    trial.add("b")
    setattr(scheduler, trial.limit, 1)
    tokens = trial.step()
    setattr(scheduler, trial.limit, full)
    if set(tokens) != {"a"}:
        return f"with {trial.limit} of 1, a step ran {sorted(tokens)}"
    return ""


def last_is_preempted(trial: Trial) -> str:
    """Where KV blocks are short, the last of `running` loses its own."""
    scheduler = trial.scheduler
    size = scheduler.block_size
    if size + 4 > scheduler.max_model_len or len(scheduler.kv_cache_config.kv_cache_groups) > 1:
        return ""  # a request of one block cannot be made to need a second one
    trial.add("a", "b", prompt=size)
    for _ in range(2 * size):
        if trial.generating("a") and trial.generating("b"):
            break
        trial.step()
    pool = scheduler.kv_cache_manager.block_pool
    pool.get_new_blocks(pool.get_num_free_blocks())
    tokens = trial.step()
    if set(tokens) != {"a"} or trial.running() != ["a"]:
        return f"where KV blocks are short, of a, b in `running` {sorted(tokens)} ran"
    return ""


CHECKS: tuple[Callable[[Trial], str], ...] = (
    running_request_is_kept_out,
    waiting_request_is_kept_out,
    tokens_end_the_step,
    seats_are_limited,
    last_is_preempted,
)


def check_meaning(kind: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """BackendError that says what vLLM's class `kind` does otherwise than we need it."""
    import vllm

    faults: list[str] = []
    for check in CHECKS:
        try:
            fault = check(Trial(kind, args, kwargs))
        except Exception as error:  # noqa: BLE001 whatever it raises is the answer
            fault = f"{check.__name__.replace('_', ' ')}: {told(error)}"
        if fault:
            faults.append(fault)
    if faults:
        raise BackendError(
            f"vLLM {vllm.__version__} does not schedule as this scheduler needs it: "
            + "; ".join(faults)
        )
