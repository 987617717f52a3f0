"""Every stored profile of llm-d-benchmark is run, or refused with the reason that is expected.

They lie outside of the repository: in the folder that NEUSTREAM_LLMD names, else beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from profile_files import bare  # noqa: F401

from neustream.bench.profiles import Unrunnable, read_profile
from neustream.bench.profiles.telling import lines
from neustream.bench.profiles.words import Words
from neustream.errors import ConfigError
from neustream.workload.texts import Texts

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("NEUSTREAM_LLMD") or ROOT.parent / "shared/reference/llmd") / "profiles"
FOUND = sorted(FOLDER.glob("*/*.yaml*"))
pytestmark = [
    pytest.mark.usefixtures("bare"),
    pytest.mark.skipif(not FOUND, reason="NEUSTREAM_LLMD names no folder with llm-d-benchmark's profiles"),
]
RUN = "run"
EXPECTED = {
    "aiperf": "aiperf is not run",
    "eval-containers": "eval-containers is not run",
    "inferencemax": "inferencemax is not run",
    "lm-eval": "lm-eval is not run",
    "priority-mix": "priority-mix is not run",
    "guidellm/concurrent-1k-1k": RUN,
    "guidellm/multi-turn": RUN,
    "guidellm/sanity_concurrent": RUN,
    "guidellm/sanity_random": RUN,
    "inference-perf/agentic_code_generation": RUN,
    "inference-perf/chatbot_sharegpt": "data.type shareGPT needs a data set of the Hugging Face hub",
    "inference-perf/chatbot_synthetic": RUN,
    "inference-perf/code_completion_synthetic": RUN,
    "inference-perf/guide_multimodal-serving_1": "unknown key",
    "inference-perf/guide_optimized-baseline_1": RUN,
    "inference-perf/guide_pd-disaggregation_1": RUN,
    "inference-perf/guide_precise-prefix-cache-routing_1": RUN,
    "inference-perf/guide_predicted-latency-routing_1": "unknown key 'tokenizer.data'",
    "inference-perf/interactive-chat": RUN,
    "inference-perf/otel_traces": "load.type: sessions of recorded traces are not replayed",
    "inference-perf/random_concurrent": "unknown key 'data.input_distribution.std'; did you mean 'std_dev'",
    "inference-perf/sanity_random": RUN,
    "inference-perf/shared_prefix_multi_turn_chat": RUN,
    "inference-perf/shared_prefix_synthetic": RUN,
    "inference-perf/summarization_synthetic": RUN,
    "nop/nop": RUN,
    "vllm-benchmark/random_concurrent": RUN,
    "vllm-benchmark/sanity_random": RUN,
    "vllm-benchmark/sharegpt": "is no local file, and nothing is loaded from a hub",
}
"""A profile, or all of a tool: run, or words of the reason."""


def name_of(path):
    return f"{path.parent.name}/{path.name.partition('.yaml')[0]}"


@pytest.mark.parametrize("path", FOUND, ids=[name_of(path) for path in FOUND])
def test_a_stored_profile_is_run_or_refused_as_expected(path):
    expected = EXPECTED.get(name_of(path), EXPECTED.get(path.parent.name))
    try:
        profile = read_profile(path)
    except (Unrunnable, ConfigError) as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
        assert expected is None or expected in str(error), "the reason is another"
        return
    assert expected in (None, RUN), "it was to be refused"
    assert profile.dialect == path.parent.name and any("in all" in line for line in lines(profile, Texts())) != (
        profile.dialect == "nop"
    )


@pytest.mark.parametrize("path", FOUND, ids=[name_of(path) for path in FOUND])
def test_the_loads_of_a_stored_profile_can_be_drawn(path):
    try:
        profile = read_profile(path)
    except (Unrunnable, ConfigError):
        pytest.skip("it is refused")
    for number, load in enumerate(profile.played_first[:2]):
        few = load if load.requests is None else load.__class__(**{**vars(load), "requests": 3})
        plan = few.plan(number, profile.source, profile.seed, Words(0.01), profile.limits)
        asks = plan.asks[:3]
        assert len(asks) == 3 and all(ask.prompt and ask.output_tokens for ask in asks)
