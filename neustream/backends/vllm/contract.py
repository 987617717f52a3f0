"""Names of the installed vLLM that we use, looked at before the first request.

vLLM calls its scheduler interface not public. So each attribute and signature that `scheduler.py`
uses is named here; one that is missing, a version that nobody tried, or a setup that we do not
support is a BackendError at start, which says what is wrong, instead of half a scheduler. Whether
the names mean what we take them to mean, `trial.py` tries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from neustream.errors import BackendError

FIRST, LAST = (0, 28), (0, 32)
"""Versions of vLLM (`vllm.__version__`) that this backend is for, both ends included."""

METHODS: dict[str, tuple[str, ...]] = {
    "add_request": ("request",),
    "finish_requests": ("request_ids", "finished_status"),
    "has_requests": (),
    "schedule": (),
    "update_from_output": ("scheduler_output", "model_runner_output"),
}
"""Methods of vLLM's Scheduler that we override or call, with the arguments that we give or take by
position."""

SCHEDULER = (
    "block_size",
    "kv_cache_manager",
    "max_model_len",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "requests",
    "running",
    "waiting",
)
"""Attributes of a scheduler."""

REQUEST = (
    "arrival_time",
    "client_index",
    "drop_stale_output",
    "is_prefill_chunk",
    "max_tokens",
    "num_computed_tokens",
    "num_output_placeholders",
    "num_output_tokens",
    "num_preemptions",
    "num_prompt_tokens",
    "num_stale_output_tokens",
    "sampling_params",
    "status",
)
"""Attributes of its requests."""

LIMITS = ("max_num_active_reqs", "max_num_running_reqs")
"""Attributes of a scheduler that limit the running requests; the first that is there counts."""

STATUS = ("WAITING", "RUNNING", "PREEMPTED", "FINISHED_ABORTED")
QUEUE = ("clear", "extend", "remove_requests", "__iter__")
OUTPUT = ("request_id", "new_token_ids", "finish_reason", "stop_reason")


def check_version(version: str) -> None:
    """BackendError if this backend is not for vLLM `version`."""
    parts = version.split(".")[:2]
    known = len(parts) == 2 and all(part.isdigit() for part in parts)
    if not known or not FIRST <= (int(parts[0]), int(parts[1])) <= LAST:
        low, high = (".".join(map(str, end)) for end in (FIRST, LAST))
        raise BackendError(
            f"vLLM {version} is not supported: this scheduler is for {low} to {high}"
        )


def check_classes() -> None:
    """BackendError that names all that the installed vLLM lacks of what we override or use."""
    import vllm
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.request_queue import FCFSRequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.request import Request, RequestStatus

    check_version(vllm.__version__)
    faults: list[str] = []
    for cls in (Scheduler, AsyncScheduler):
        faults += [fault for name, args in METHODS.items() if (fault := _method(cls, name, args))]
    faults += _without(RequestStatus, "RequestStatus", STATUS)
    faults += _without(FCFSRequestQueue, "FCFSRequestQueue", QUEUE)
    faults += _without(FinishReason, "FinishReason", ("ABORT",))
    faults += _without_fields(EngineCoreOutput, OUTPUT)
    faults += _without_fields(EngineCoreOutputs, ("outputs",))
    faults += _without_fields(SchedulerOutput, ("num_scheduled_tokens", "preempted_req_ids"))
    try:
        request = Request(
            request_id="",
            prompt_token_ids=[1],
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
        )
        faults += _without(request, "Request", REQUEST)
    except TypeError as error:
        faults.append(f"Request({error})")
    _refuse(faults, vllm.__version__)


def _without(holder: Any, label: str, names: Iterable[str]) -> list[str]:
    """The attributes that an object lacks."""
    return [f"{label}.{name}" for name in names if not hasattr(holder, name)]


def _without_fields(holder: type[Any], names: Iterable[str]) -> list[str]:
    """The fields that a struct of msgspec or a dataclass lacks."""
    fields = getattr(holder, "__struct_fields__", None)
    fields = fields or getattr(holder, "__dataclass_fields__", {})
    return [f"{holder.__name__}.{name}" for name in names if name not in fields]


def eos_of(vllm_config: Any) -> list[int]:
    """The token that the model ends texts with, in a list; empty: it says none."""
    found = getattr(vllm_config.model_config.hf_text_config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    return [id for id in ids[:1] if isinstance(id, int)]


def check_scheduler(scheduler: Any) -> None:
    """BackendError that names what a scheduler lacks that vLLM has just made."""
    import vllm

    faults = _without(scheduler, "Scheduler", SCHEDULER)
    if not faults:
        if not isinstance(scheduler.running, list):
            faults.append("Scheduler.running (a list)")
        if not isinstance(scheduler.max_num_scheduled_tokens, int):
            faults.append("Scheduler.max_num_scheduled_tokens (a number)")
    _refuse(faults, vllm.__version__)


def limit_name(scheduler: Any) -> str:
    """The attribute of a scheduler that limits who is admitted to the running ones."""
    return next(name for name in LIMITS if hasattr(scheduler, name))


def check_setup(config: Any) -> None:
    """BackendError if vLLM was configured for something that this scheduler was not made for."""
    scheduler, parallel = config.scheduler_config, config.parallel_config
    refusals = {
        "speculative decoding": config.speculative_config is not None,
        f"scheduling_policy={scheduler.policy!r} (use 'fcfs': the order is ours)": scheduler.policy
        != "fcfs",
        "chunked prefill switched off": not scheduler.enable_chunked_prefill,
        "KV connectors (kv_transfer_config)": config.kv_transfer_config is not None,
        "encoder connectors (ec_transfer_config)": getattr(config, "ec_transfer_config", None)
        is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        f"runner_type={config.model_config.runner_type!r}": config.model_config.runner_type
        != "generate",
        "encoder-decoder models": config.model_config.is_encoder_decoder,
    }
    if wrong := [what for what, is_so in refusals.items() if is_so]:
        raise BackendError(f"the SLO scheduler does not support {', '.join(wrong)}")


def check_pipeline(scheduler: Any) -> None:
    """BackendError if an engine that schedules ahead was given a class that cannot."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    ahead = scheduler.vllm_config.scheduler_config.async_scheduling
    if ahead and not isinstance(scheduler, AsyncScheduler):
        raise BackendError(
            f"{type(scheduler).__qualname__} is no AsyncScheduler of vLLM's, but this engine "
            f"schedules a step while the one before it runs: derive it from AsyncSLOScheduler, or "
            f"set async_scheduling=False"
        )


def _method(cls: type, name: str, args: tuple[str, ...]) -> str:
    method: Callable[..., Any] | None = getattr(cls, name, None)
    if method is None:
        return f"{cls.__name__}.{name}"
    have = list(inspect.signature(method).parameters.values())[1:]
    names = tuple(p.name for p in have)
    more = [
        p.name
        for p in have[len(args) :]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if names[: len(args)] != args or more:
        return (
            f"{cls.__name__}.{name}({', '.join(args)}) (it takes {', '.join(names) or 'nothing'})"
        )
    return ""


def _refuse(faults: list[str], version: str) -> None:
    if faults:
        named = ", ".join(dict.fromkeys(faults))
        raise BackendError(
            f"vLLM {version} is not as this scheduler needs it; missing or changed: {named}"
        )
