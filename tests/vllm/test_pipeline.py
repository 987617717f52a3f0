"""Our scheduler with a step always in flight: the real one, driven by hand, without a model.

vLLM's CPU platform runs one step at a time whatever it is asked for, so the pipeline is made here: a
step is scheduled before the one in front of it is reported, as `EngineCore.step_with_batch_queue` does.
An engine that does so is in test_on_gpu.py.
"""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest

from neustream.backends.vllm import slo

EOS = 2


@pytest.fixture
def make(engines):
    """Makes a scheduler for a pipeline of `depth` steps, with the configuration of a real engine."""
    rig = engines("neustream.backends.vllm.SLOScheduler", num_gpu_blocks_override=40)
    config, made = rig.core.vllm_config, rig.scheduler
    before = config.scheduler_config.async_scheduling, config.additional_config

    def make(kind, depth, policy):
        from neustream.backends.vllm import scheduler

        config.scheduler_config.async_scheduling = depth == 2
        config.additional_config = {"neustream": {"policy": policy}}
        return getattr(scheduler, kind)(
            vllm_config=config,
            kv_cache_config=made.kv_cache_config,
            structured_output_manager=rig.core.structured_output_manager,
            block_size=made.block_size,
            hash_block_size=made.hash_block_size,
            log_stats=True,
        )

    yield make
    config.scheduler_config.async_scheduling, config.additional_config = before


class Pipeline:
    """What vLLM's engine does around its scheduler, with tokens out of a hat."""

    def __init__(self, scheduler, depth, seed):
        self.scheduler, self.depth, self.rnd = scheduler, depth, random.Random(seed)
        self.flying = deque()
        self.ended, self.tokens = {}, Counter()
        self.steps = self.deepest = 0

    def ask(self, id, prompt, max_tokens, extra=None, ignore_eos=False):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, detokenize=False, extra_args=extra)
        params.update_from_generation_config({}, EOS)
        self.scheduler.add_request(Request(id, [5] * prompt, params, None))

    def turn(self):
        s = self.scheduler
        if s.has_requests() and len(self.flying) < self.depth:
            output = s.schedule()
            self.steps += 1
            ids = list(output.num_scheduled_tokens)
            # the last chunk of a prompt, and each decode, samples a token
            sampled = [[] if s.requests[id].is_prefill_chunk else [self.token()] for id in ids]
            self.flying.appendleft((output, ids, sampled))
            self.deepest = max(self.deepest, len(self.flying))
            if len(self.flying) < self.depth and (ids or s.has_requests()):
                return
        if self.flying:
            self.land()

    def token(self):
        return EOS if self.rnd.random() < 0.02 else 7

    def land(self):
        from vllm.v1.outputs import ModelRunnerOutput

        output, ids, sampled = self.flying.pop()
        model = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={id: at for at, id in enumerate(ids)}, sampled_token_ids=sampled
        )
        for outputs in self.scheduler.update_from_output(output, model).values():
            for out in outputs.outputs:
                assert out.request_id not in self.ended, f"{out.request_id} was reported twice"
                self.tokens[out.request_id] += len(out.new_token_ids)
                if out.finish_reason is not None:
                    self.ended[out.request_id] = out

    def agree(self):
        """A policy would see each request as vLLM has it, what is in flight counted as done."""
        s = self.scheduler
        view = s.views.build(s.requests, s._slos, 0, 0.0)
        for job in view.jobs:
            request = s.requests[job.id]
            assert job.call_outputs == request.num_output_tokens + request.num_output_placeholders
            assert job.params["prompt_tokens"] + job.call_outputs - job.whole == 0
            lacks = job.whole - request.num_computed_tokens
            assert lacks == (1 if job.stage.phase == "decode" else job.size) > 0, (job, request.status)


@pytest.mark.parametrize("policy", ["default", "fcfs", "edf", "neustream"])
@pytest.mark.parametrize("kind, depth", [("SLOScheduler", 2), ("AsyncSLOScheduler", 1), ("SLOScheduler", 1)])
def test_nothing_is_lost_with_a_step_in_flight(make, kind, depth, policy):
    scheduler = make(kind, depth, policy)
    line, rnd = Pipeline(scheduler, depth, 1), random.Random(2)
    asked, aborted, states = {}, set(), Counter()
    while len(line.ended) + len(aborted) < 200:
        assert line.steps < 30_000, (len(line.ended), len(scheduler.running), len(scheduler.waiting))
        while len(asked) < 200 and rnd.random() < 0.3:
            id = f"r{len(asked)}"
            asked[id] = rnd.randint(1, 60)
            extra = rnd.choice([None, slo(total_ms=60_000), slo(ttft_ms=60_000, tpot_ms=100), slo(total_ms=15)])
            line.ask(id, rnd.randint(1, 300), asked[id], extra, ignore_eos=rnd.random() < 0.5)
        if rnd.random() < 0.03 and scheduler.requests:
            request = rnd.choice(list(scheduler.requests.values()))
            states[request.status.name] += 1
            aborted.add(request.request_id)
            from vllm.v1.request import RequestStatus

            scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
        if rnd.random() < 0.01:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        line.turn()
        line.agree()
    while line.flying:
        line.land()
    assert not aborted & set(line.ended)
    reasons = Counter(str(end.finish_reason) for end in line.ended.values())
    assert set(reasons) == {"stop", "length", "abort"}
    for id, end in line.ended.items():
        assert line.tokens[id] <= asked[id]
        assert str(end.finish_reason) != "length" or line.tokens[id] == asked[id]
        assert str(end.finish_reason) != "abort" or end.stop_reason.startswith("slo: ")
    assert {"RUNNING", "WAITING"} <= set(states)
    assert scheduler.stats.errors == 0 and scheduler.stats.steered > 0
    assert not scheduler.requests and not scheduler.running and not len(scheduler.waiting)
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    scheduler.schedule()
    assert not scheduler.views.jobs and not scheduler._promised and not scheduler._slos


@pytest.mark.parametrize("kind", ["SLOScheduler", "AsyncSLOScheduler"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_class_is_the_one_that_the_engine_needs(make, kind, depth):
    name = type(make(kind, depth, "fcfs")).__name__
    assert name == ("AsyncSLOScheduler" if depth == 2 else kind)


def test_a_class_that_cannot_schedule_ahead_is_refused_where_that_is_done(make, monkeypatch):
    from neustream.backends.vllm import scheduler
    from neustream.errors import BackendError

    class Own(scheduler.SLOScheduler):
        pass

    monkeypatch.setattr(scheduler, "Own", Own, raising=False)
    assert type(make("Own", 1, "fcfs")) is Own
    with pytest.raises(BackendError, match=r"Own is no AsyncScheduler .* derive it from AsyncSLOScheduler"):
        make("Own", 2, "fcfs")


def test_a_pipeline_keeps_its_depth(make):
    """With an SLO to keep, as without one, step n + 1 is scheduled before step n is reported."""
    scheduler = make("SLOScheduler", 2, "fcfs")
    line = Pipeline(scheduler, 2, 1)
    line.ask("r", 20, 30, slo(total_ms=60_000), ignore_eos=True)
    while "r" not in line.ended:
        line.turn()
        assert line.steps < 100
    assert line.deepest == 2 and line.steps <= 32
    assert line.tokens["r"] == 30


def test_an_engine_error_in_one_step_leaves_a_scheduler_that_works(make):
    """The step is never reported; once its requests are aborted, all is as if they had not been."""
    from vllm.v1.request import RequestStatus

    scheduler = make("SLOScheduler", 1, "fcfs")
    line = Pipeline(scheduler, 1, 1)
    for at in range(3):
        line.ask(f"lost{at}", 40, 10, slo(total_ms=60_000), ignore_eos=True)
    line.turn()
    scheduler.schedule()  # and the model raises
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    line.ask("next", 40, 10, slo(total_ms=60_000), ignore_eos=True)
    while "next" not in line.ended:
        line.turn()
        assert line.steps < 50
    assert str(line.ended["next"].finish_reason) == "length"
    assert set(line.ended) == {"next"} and not scheduler.requests and not scheduler.views.jobs
