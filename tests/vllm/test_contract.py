"""What the scheduler refuses at start, and how it says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from neustream.backends.vllm import contract
from neustream.errors import BackendError

OURS = "neustream.backends.vllm.SLOScheduler"


@pytest.mark.parametrize("version", ["0.28.0", "0.32.1", "0.32.0rc1", "0.32.0+cpu"])
def test_supported_versions(version):
    assert contract.check_version(version) is None  # no BackendError


@pytest.mark.parametrize("version", ["0.27.3", "0.33.0", "1.0.0", "dev", "0.x"])
def test_other_versions_are_refused_by_name(version):
    with pytest.raises(BackendError, match=rf"vLLM {version} is not supported.* 0\.28 to 0\.32"):
        contract.check_version(version)


def test_the_installed_vllm_keeps_the_contract():
    assert contract.check_classes() is None  # no BackendError


def test_a_version_from_tomorrow_is_refused_at_start(monkeypatch, model):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.41.0")
    with pytest.raises(BackendError, match=r"vLLM 0\.41\.0 is not supported"):
        vllm.LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            gpu_memory_utilization=0.1,
            scheduler_cls=OURS,
        )


def test_what_is_missing_is_named(monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    def update_from_output(self, output, model_output, grammar):
        pass

    monkeypatch.setattr(Scheduler, "update_from_output", update_from_output)
    monkeypatch.setattr(contract, "STATUS", (*contract.STATUS, "SLEEPING"))
    with pytest.raises(BackendError) as refused:
        contract.check_classes()
    said = str(refused.value)
    assert "RequestStatus.SLEEPING" in said
    assert "Scheduler.update_from_output(scheduler_output, model_runner_output) (it takes output, model_output" in said


def test_a_scheduler_without_our_attributes_is_refused():
    with pytest.raises(BackendError, match=r"Scheduler\.running.*Scheduler\.waiting"):
        contract.check_scheduler(SimpleNamespace(requests={}))


@pytest.mark.parametrize(
    "setup, says",
    [
        ({"scheduling_policy": "priority"}, "scheduling_policy='priority'"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}, "chunked prefill switched off"),
    ],
)
def test_setups_that_are_not_supported_are_refused_at_start(engines, setup, says):
    with pytest.raises(BackendError, match=f"does not support.*{says}"):
        engines(OURS, **setup)


@pytest.mark.parametrize(
    "part, name, value, says",
    [
        ("", "speculative_config", object(), "speculative decoding"),
        ("", "kv_transfer_config", object(), "KV connectors"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
        ("model_config", "runner_type", "pooling", "runner_type='pooling'"),
    ],
)
def test_setups_that_cannot_be_made_here_are_refused_too(engines, part, name, value, says):
    real = engines(OURS).core.vllm_config
    parts = {
        some: SimpleNamespace(
            **{key: getattr(getattr(real, some), key) for key in keys}, **({name: value} if some == part else {})
        )
        for some, keys in {
            "scheduler_config": ("policy", "enable_chunked_prefill"),
            "parallel_config": () if part == "parallel_config" else ("pipeline_parallel_size",),
            "model_config": ("is_encoder_decoder",) + (() if part == "model_config" else ("runner_type",)),
        }.items()
    }
    whole = {"speculative_config": None, "kv_transfer_config": None} | ({name: value} if not part else {})
    with pytest.raises(BackendError, match=f"does not support {says}"):
        contract.check_setup(SimpleNamespace(**parts, **whole))


def test_a_wrong_setting_is_refused_at_start(engines):
    from neustream.errors import ConfigError

    with pytest.raises(ConfigError, match="unknown key 'polcy'; did you mean 'policy'"):
        engines(OURS, additional_config={"neustream": {"polcy": "edf"}})


def test_a_cache_smaller_than_the_longest_request_is_vllms_to_refuse(engines):
    """So no request that vLLM lets in is larger than its cache."""
    with pytest.raises(ValueError, match="KV cache"):
        engines(OURS, num_gpu_blocks_override=8)


# -- what vLLM's queues mean ------------------------------------------------------------------------


def parts_of(rig):
    """What a scheduler of an engine's is made with."""
    made = rig.scheduler
    return {
        "vllm_config": rig.core.vllm_config,
        "kv_cache_config": made.kv_cache_config,
        "structured_output_manager": rig.core.structured_output_manager,
        "block_size": made.block_size,
        "hash_block_size": made.hash_block_size,
    }


@pytest.mark.parametrize("kind", ["Scheduler", "AsyncScheduler"])
@pytest.mark.parametrize("setup", [{}, {"max_num_seqs": 1}, {"enable_prefix_caching": True}], ids=str)
def test_the_installed_vllm_schedules_as_we_need_it(engines, kind, setup):
    from vllm.v1.core.sched import async_scheduler

    from neustream.backends.vllm.trial import check_meaning

    rig = engines(OURS, **setup)
    free = rig.pool.get_num_free_blocks()
    assert check_meaning(getattr(async_scheduler, kind), (), parts_of(rig)) is None  # no BackendError
    assert rig.pool.get_num_free_blocks() == free and not rig.scheduler.requests
    assert rig.core.vllm_config.scheduler_config.max_num_seqs == setup.get("max_num_seqs", 8)


def lose_what_is_not_running(scheduler):
    for request in scheduler.requests.values():
        if request.num_computed_tokens and request not in scheduler.running:
            scheduler.kv_cache_manager.free(request)


def run_all_requests(scheduler):
    for request in scheduler.requests.values():
        if request.num_computed_tokens and request not in scheduler.running:
            scheduler.running.append(request)


def begin_all_requests(scheduler):
    for request in scheduler.requests.values():
        if not request.num_computed_tokens and request not in list(scheduler.waiting):
            scheduler.waiting.add_request(request)


def forget_the_bound(scheduler):
    scheduler.max_num_scheduled_tokens = 2048


def forget_the_limit(scheduler):
    setattr(scheduler, contract.limit_name(scheduler), 8)


def turn_the_list_round(scheduler):
    if not scheduler.waiting:
        scheduler.running.reverse()


@pytest.mark.parametrize(
    "before, says",
    [
        (lose_what_is_not_running, "a request that is out of `running` for one step loses what it has computed"),
        (run_all_requests, "with b out of `running`, a step ran ['a', 'b', 'c'] in place of a and c"),
        (begin_all_requests, "with c, a in `waiting`, a step began ['c', 'a', 'b']"),
        (forget_the_bound, "of c, b, a in `running`, ['c', 'b', 'a'] got the two tokens of a step"),
        (forget_the_limit, "reqs of 1, a step ran ['a', 'b']"),
        (turn_the_list_round, "where KV blocks are short, of a, b in `running` ['b'] ran"),
    ],
)
def test_a_vllm_that_means_something_else_is_refused(engines, before, says):
    from vllm.v1.core.sched.scheduler import Scheduler

    from neustream.backends.vllm.trial import check_meaning

    class Other(Scheduler):
        def schedule(self, *args, **kwargs):
            before(self)
            return super().schedule(*args, **kwargs)

    with pytest.raises(BackendError) as refused:
        check_meaning(Other, (), parts_of(engines(OURS)))
    assert "does not schedule as this scheduler needs it: " in str(refused.value)
    assert says in str(refused.value)


def test_a_vllm_whose_steps_raise_is_refused(engines):
    from vllm.v1.core.sched.scheduler import Scheduler

    from neustream.backends.vllm.trial import check_meaning

    class Other(Scheduler):
        def update_from_output(self, scheduler_output, model_runner_output):
            raise KeyError("req_ids")

    with pytest.raises(BackendError, match="running request is kept out: KeyError: 'req_ids'; waiting request"):
        check_meaning(Other, (), parts_of(engines(OURS)))
