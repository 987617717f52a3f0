"""The data of inference-perf's profiles: what requests ask for, as sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_validator

from neustream.bench.profiles.inference_perf_lengths import Distribution, Drawn
from neustream.bench.profiles.inference_perf_media import Multimodal
from neustream.bench.profiles.marks import Count, Ignored, Length, Refused, Section, Seed
from neustream.workload.lengths import Lengths

HUB = "needs a data set of the Hugging Face hub, from which nothing is loaded"


class Trace(Section):
    file: str
    format: Literal["AzurePublicDataset"] = "AzurePublicDataset"


class SharedPrefix(Section):
    num_groups: Count = Field(
        default=10, validation_alias=AliasChoices("num_groups", "num_unique_system_prompts")
    )
    num_prompts_per_group: Count = Field(
        default=10,
        validation_alias=AliasChoices("num_prompts_per_group", "num_users_per_system_prompt"),
    )
    system_prompt_len: Drawn = 100
    question_len: Drawn = 50
    output_len: Drawn = 50
    seed: Seed | None = None
    question_distribution: Distribution | None = None
    output_distribution: Distribution | None = None
    enable_multi_turn_chat: bool = False
    multimodal: Annotated[Multimodal | None, Refused("prompts are texts alone")] = None

    @model_validator(mode="after")
    def _not_both(self) -> SharedPrefix:
        for name in ("question", "output"):
            inline = isinstance(getattr(self, f"{name}_len"), Distribution)
            if inline and getattr(self, f"{name}_distribution") is not None:
                raise ValueError(
                    f"{name}_len is a distribution, and {name}_distribution is given too"
                )
        return self

    def lengths(self, name: Literal["system_prompt", "question", "output"]) -> Lengths:
        """Of one of the three parts."""
        given = getattr(self, f"{name}_len")
        legacy = getattr(self, f"{name}_distribution", None)
        if isinstance(given, Distribution):
            return given.lengths()
        return legacy.lengths() if legacy is not None else Lengths.fixed(given)


class Conversations(Section):
    seed: Seed = 42
    num_conversations: Count = 200
    shared_system_prompt_len: Length = 8359
    dynamic_system_prompt_len: Distribution | None = None
    turns_per_conversation: Distribution | None = None
    input_tokens_per_turn: Distribution | None = None
    output_tokens_per_turn: Distribution | None = None
    tool_call_latency_sec: Distribution | None = None
    max_model_len: Count | None = None


DataType = Literal[
    "mock",
    "shareGPT",
    "synthetic",
    "random",
    "shared_prefix",
    "cnn_dailymail",
    "infinity_instruct",
    "billsum_conversations",
    "otel_trace_replay",
    "weka_trace_replay",
    "conversation_replay",
    "visionarena",
    "synthetic_agentic",
]
NOT_RUN: Mapping[str, str] = {
    "cnn_dailymail": HUB,
    "infinity_instruct": HUB,
    "billsum_conversations": HUB,
    "visionarena": HUB,
    "otel_trace_replay": "recorded OpenTelemetry traces are not replayed",
    "weka_trace_replay": "recorded traces of agents are not replayed",
    "synthetic_agentic": "sessions of agents that branch are not made",
}
"""Types of data that are refused, and why."""


class Data(Section):
    type: DataType = "mock"
    path: str | None = None
    corpus_file_path: Annotated[str | None, Ignored("texts are made of words drawn at random")] = (
        None
    )
    input_distribution: Distribution | None = None
    output_distribution: Distribution | None = None
    shared_prefix: SharedPrefix | None = None
    multimodal: Annotated[Multimodal | None, Refused("prompts are texts alone")] = None
    trace: Annotated[Trace | None, Refused("`neustream bench serve` replays traces")] = None
    otel_trace_replay: dict[str, Any] | None = None
    weka_trace_replay: dict[str, Any] | None = None
    conversation_replay: Conversations | None = None
    visionarena: dict[str, Any] | None = None
    synthetic_agentic: dict[str, Any] | None = None
    use_chat_template: Annotated[
        bool, Refused("prompts are not put into a chat template by the client; api.type chat does")
    ] = False
