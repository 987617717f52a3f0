"""What requests ask for: options of `neustream bench serve` and `search`, under vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from neustream.commands.bench_parsing import object_of, option, share, size, weighted, whole
from neustream.commands.bench_refused import DATASETS as REFUSED_DATASETS
from neustream.errors import ConfigError, nearest
from neustream.workload.conversations import SharedPrefix
from neustream.workload.datasets import Images
from neustream.workload.formats import FORMATS
from neustream.workload.lengths import Lengths
from neustream.workload.of_traces import TraceFile
from neustream.workload.prompt_files import UNSAID, PromptFile
from neustream.workload.sources import Dataset, Prefixes, RandomTexts
from neustream.workload.trace import Trace, Window


@dataclass(frozen=True)
class DataOptions:
    """What requests ask for."""

    dataset_name: Annotated[
        str, option("random, sharegpt, custom, prefix_repetition, sessions, images, trace (burstgpt, timed_trace).")
    ] = "random"
    dataset_path: Annotated[Path | None, option("Of sharegpt, custom and trace.")] = None
    num_prompts: Annotated[int, option("How many requests; the most of a trace.", min=1, max=10_000_000)] = 1000
    input_len: Annotated[int | None, option("In place of the data set's own.", min=1)] = None
    output_len: Annotated[int | None, option("The same.", min=1)] = None
    random_input_len: Annotated[int, option("Tokens of prompts.", min=1)] = 1024
    random_output_len: Annotated[int, option("Tokens that are generated.", min=1)] = 128
    random_range_ratio: Annotated[
        str, option("Lengths from (1 - r) to (1 + r) times these; or JSON with input and output.")
    ] = "0"
    random_prefix_len: Annotated[int, option("Tokens before each prompt, the same in all.", min=0)] = 0
    sharegpt_output_len: Annotated[int | None, option("In place of the answers' lengths.", min=1)] = None
    custom_output_len: Annotated[
        int | None, option("In place of what lines say; -1: where they say nothing, 256.", min=-1)
    ] = None
    no_oversample: Annotated[bool, typer.Option("--no-oversample", help="Of a file no prompt twice.")] = False
    disable_shuffle: Annotated[bool, typer.Option("--disable-shuffle", help="Of a file in its order.")] = False
    prefix_repetition_prefix_len: Annotated[int, option("Tokens that prompts share.", min=1)] = 256
    prefix_repetition_suffix_len: Annotated[int, option("Tokens of their own.", min=1)] = 256
    prefix_repetition_num_prefixes: Annotated[int, option("How many beginnings.", min=1)] = 10
    prefix_repetition_output_len: Annotated[int, option("Tokens that are generated.", min=1)] = 128
    sessions_groups: Annotated[int, option("System prompts.", min=1)] = 4
    sessions_system_len: Annotated[int, option("Tokens of each.", min=0)] = 256
    sessions_question_len: Annotated[int, option("Tokens of each turn.", min=1)] = 64
    sessions_turns: Annotated[int, option("Turns of a conversation.", min=1)] = 4
    sessions_think: Annotated[float, option("Seconds between turns.", min=0, max=86_400)] = 1.0
    image_sizes: Annotated[str | None, option("WxH[:weight], with commas between; default: the server's.")] = None
    image_steps: Annotated[str, option("STEPS[:weight], with commas between them.")] = "20"
    image_number: Annotated[int, option("Images of each request.", min=1, max=10)] = 1
    trace_format: Annotated[str, option(f"auto, {', '.join(FORMATS)}.")] = "auto"
    trace_start: Annotated[float, option("Seconds of the trace that are left out.", min=0)] = 0.0
    trace_duration: Annotated[float | None, option("Seconds of it that are taken.", min=0.001)] = None
    self_timed: Annotated[
        bool | None,
        typer.Option("--self-timed/--no-self-timed", help="A trace's own arrivals; default: without a rate."),
    ] = None
    lora_modules: Annotated[list[str] | None, option("Models; each request asks for one of them.")] = None
    lora_assignment: Annotated[str, option("random or round-robin.")] = "random"
    trace_speed: Annotated[float, option("How much faster it is replayed.", min=1e-6)] = 1.0

    def dataset(self) -> Dataset:
        """ConfigError names the option that is wrong."""
        made = _DATASETS.get(self.dataset_name)
        if self.dataset_name in REFUSED_DATASETS:
            raise ConfigError(f"--dataset-name {self.dataset_name}: not read: {REFUSED_DATASETS[self.dataset_name]}")
        if made is None:
            raise ConfigError(f"--dataset-name {self.dataset_name!r}: {nearest(self.dataset_name, _DATASETS)}")
        return made(self)

    @property
    def timed(self) -> bool:
        """Whether requests come as a trace has them, where nobody says otherwise."""
        return self.dataset_name != "burstgpt" if self.self_timed is None else self.self_timed

    @property
    def assignment(self) -> bool:
        """Whether models are asked in turns; ConfigError for an assignment that is none."""
        allowed = ("random", "round-robin")
        if self.lora_assignment not in allowed:
            raise ConfigError(f"--lora-assignment {self.lora_assignment!r}: {nearest(self.lora_assignment, allowed)}")
        return self.lora_assignment == "round-robin"

    @property
    def models(self) -> list[str]:
        """That each request asks for one of; ConfigError for one without a name."""
        if "" in (self.lora_modules or ()):
            raise ConfigError("--lora-modules '': expected names of models")
        return self.lora_modules or []

    def check_timing(self, rated: bool) -> None:
        """ConfigError where arrivals of a trace are asked for that cannot be had; `rated`: there is a rate."""
        if self.self_timed and (rated or self.dataset_name not in TRACES):
            why = "there is a rate" if rated else f"--dataset-name {self.dataset_name} has no arrivals of its own"
            raise ConfigError(f"--self-timed: {why}; expected a trace, without --request-rate")

    def _path(self) -> Path:
        if self.dataset_path is None:
            raise ConfigError(f"--dataset-name {self.dataset_name}: needs --dataset-path FILE")
        return self.dataset_path

    def _random(self) -> Dataset:
        ratios, prefix = self._ratios(), self.random_prefix_len
        return RandomTexts(
            Lengths.around(self.input_len or self.random_input_len, ratios[0]),
            Lengths.around(self.output_len or self.random_output_len, ratios[1]),
            (Prefixes(1, prefix),) if prefix else (),
        )

    def _ratios(self) -> tuple[float, float]:
        """Of prompts and of outputs."""
        name = "--random-range-ratio"
        if self.random_range_ratio.lstrip().startswith("{"):
            given = object_of(name, self.random_range_ratio)
            if given.keys() != {"input", "output"}:
                raise ConfigError(
                    f"{name} {self.random_range_ratio}: expected the keys input and output, and no others"
                )
            return share(f"{name} input", given["input"]), share(f"{name} output", given["output"])
        both = share(name, self.random_range_ratio)
        return both, both

    def _repeated(self) -> Dataset:
        return SharedPrefix(
            self.prefix_repetition_num_prefixes,
            None,
            Lengths.fixed(self.prefix_repetition_prefix_len),
            Lengths.fixed(self.input_len or self.prefix_repetition_suffix_len),
            Lengths.fixed(self.output_len or self.prefix_repetition_output_len),
        )

    def _sessions(self) -> Dataset:
        return RandomTexts(
            Lengths.fixed(self.input_len or self.sessions_question_len),
            Lengths.fixed(self.output_len or self.random_output_len),
            (Prefixes(self.sessions_groups, self.sessions_system_len),),
            self.sessions_turns,
            think=Lengths.fixed(round(1000 * self.sessions_think)),
        )

    def _sharegpt(self) -> Dataset:
        output = self.output_len or self.sharegpt_output_len
        shuffled = not self.disable_shuffle
        return PromptFile.sharegpt(self._path(), output, shuffled=shuffled, once=self.no_oversample)

    def _custom(self) -> Dataset:
        if self.custom_output_len == 0:
            raise ConfigError("--custom-output-len 0: expected a whole number, at least 1, or -1")
        own = self.custom_output_len if self.custom_output_len != -1 else None
        return PromptFile(
            self._path(),
            output_tokens=self.output_len or own,
            shuffled=not self.disable_shuffle,
            once=self.no_oversample,
            default=UNSAID,
            strict=True,
        )

    def _images(self) -> Dataset:
        drawn = weighted("--image-sizes", self.image_sizes) if self.image_sizes is not None else ()
        sizes = tuple((*size(text), weight) for text, weight in drawn) or ((None, None, 1.0),)
        steps = tuple(
            (whole("--image-steps", text), weight) for text, weight in weighted("--image-steps", self.image_steps)
        )
        return Images(sizes, steps, self.image_number)

    def _trace(self) -> Dataset:
        if self.trace_format not in ("auto", *FORMATS):
            raise ConfigError(f"--trace-format {self.trace_format!r}: {nearest(self.trace_format, ['auto', *FORMATS])}")
        window = Window(self.trace_start, self.trace_duration, None, self.trace_speed)
        return TraceFile(Trace(self._path(), self.trace_format), window, self.output_len or self.random_output_len)


_DATASETS: Mapping[str, Callable[[DataOptions], Dataset]] = {
    "random": DataOptions._random,
    "sharegpt": DataOptions._sharegpt,
    "custom": DataOptions._custom,
    "prefix_repetition": DataOptions._repeated,
    "sessions": DataOptions._sessions,
    "images": DataOptions._images,
    "trace": DataOptions._trace,
    "burstgpt": DataOptions._trace,
    "timed_trace": DataOptions._trace,
}
TRACES = ("trace", "burstgpt", "timed_trace")
"""vLLM's names mean files of any format, told by their content, as `trace` does."""
