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
        vllm.LLM(str(model), dtype="float32", enforce_eager=True, max_model_len=256, scheduler_cls=OURS)


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
