"""How much a device can serve at most, so that loads can be told as shares of it."""

from __future__ import annotations

from neustream.config import Experiment, LlmExperiment, StagesExperiment
from neustream.config.fields import mean_of
from neustream.core.steps import PhaseProfile, Step
from neustream.experiment import LlmPipeline, StagesPipeline, prepare

WHOLE_STEP = 2048
"""Tokens of the largest step of prompts that is looked at."""


def capacity(setting: Experiment) -> float:
    """Requests per second that all workers serve in batches that cost least a request.

    Steps take what is true of them and the simulation's overhead. Promises do not count.
    """
    if isinstance(setting, LlmExperiment):
        return setting.instances / _seconds_of_text(setting)
    assert isinstance(setting, StagesExperiment)
    return setting.instances / _seconds_of_image(setting)


def _seconds_of_image(setting: StagesExperiment) -> float:
    """Seconds a request of the pool that has the most to do, per worker."""
    pipeline, overhead = StagesPipeline(setting), setting.simulation.handover_s or 0.0
    profiles = pipeline.load_profiles()
    profiles |= pipeline.load_truth(profiles)
    busy = dict.fromkeys(setting.pools, 0.0)
    for name, stage in setting.stages.items():
        sizes = range(1, min(stage.max_batch, profiles[name].max_batch) + 1)
        calls = 1.0 if stage.times is None else mean_of(setting.workload.steps)
        seconds = min((profiles[name].latency(size) + overhead) / size for size in sizes)
        busy[stage.pool] += calls * seconds / setting.pools[stage.pool].workers
    return max(busy.values())


def _seconds_of_text(setting: LlmExperiment) -> float:
    """Seconds of a request of mean lengths, as many decoding at once as memory holds."""
    prepared = prepare(setting)
    profile = LlmPipeline(setting).load_profiles()[prepared.pipeline.main_stage]
    assert isinstance(profile, PhaseProfile)
    overhead, count = setting.simulation.handover_s or 0.0, len(prepared.requests)
    prompt = sum(int(request.params["prompt_tokens"]) for request in prepared.requests) / count
    outputs = sum(prepared.lengths.values()) / count
    most = profile.max_batch
    if setting.llm.memory is not None:
        most = max(min(most, int(setting.llm.memory.tokens / (prompt + outputs))), 1)
    context = int(prompt + outputs / 2)

    def decode(batch: int) -> float:
        return (profile.steps.seconds(Step(0, 0, 0, batch, batch * context)) + overhead) / batch

    def prefill(prompts: int) -> float:
        tokens = prompts * round(prompt)
        step = Step(prompts, tokens, tokens * round(prompt), 0, 0)
        return (profile.steps.seconds(step) + overhead) / prompts

    whole = max(WHOLE_STEP // max(round(prompt), 1), 1)
    return min(map(prefill, range(1, whole + 1))) + (outputs - 1) * min(map(decode, range(1, most + 1)))
