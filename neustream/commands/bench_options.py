"""The options of `neustream bench serve` and `search`: whom to ask, what, when; under vLLM's names."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.bench.plan import Api, Target
from neustream.commands.printing import notes
from neustream.errors import ConfigError, nearest, shown
from neustream.workload.asks import Limits
from neustream.workload.datasets import Dataset, Images, PrefixRepetition, PromptFile, Random, Sessions
from neustream.workload.formats import FORMATS
from neustream.workload.mixing import AskClass
from neustream.workload.of_traces import TraceFile
from neustream.workload.texts import BYTES, Texts
from neustream.workload.trace import Trace, Window

BACKENDS: Mapping[str, Api] = {
    "openai": "completions",
    "openai-chat": "chat",
    "openai-images": "images",
    "vllm": "completions",
    "inference": "inference",
    "neustream": "completions",
}
SLO_HEADERS = {"x-slo-ttft-ms": "ttft", "x-slo-tpot-ms": "tpot", "x-slo-e2e-ms": "e2e", "x-slo-class": "class"}
LIMITS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s", "e2e": "e2e_s"}
KEYS = ("NEUSTREAM_API_KEY", "OPENAI_API_KEY")
"""Variables that hold a key for the server; the first that is set counts."""
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def _option(help: str, **more: Any) -> Any:
    return typer.Option(help=help, **more)


@dataclass(frozen=True)
class ServerOptions:
    """Whom to ask, and how."""

    backend: Annotated[str, _option(f"{', '.join(BACKENDS)}.")] = "openai"
    base_url: Annotated[str | None, _option("Of the server; else --host and --port.")] = None
    host: Annotated[str, _option("Of the server.")] = "127.0.0.1"
    port: Annotated[int, _option("Of the server.", min=1, max=65535)] = 8000
    endpoint: Annotated[str | None, _option("In place of the route that the backend has.")] = None
    header: Annotated[list[str] | None, _option("KEY=VALUE of each request.")] = None
    model: Annotated[str, typer.Option("--model", "-m", help="In each body; default: the server's first.")] = ""
    served_model_name: Annotated[str, _option("The same, where --model names a tokenizer.")] = ""
    tokenizer: Annotated[str | None, _option("A tokenizer.json, a folder, or bytes; else a token a word.")] = None
    extra_body: Annotated[str, _option("JSON that is added to each body.")] = "{}"
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Fewer tokens than asked for are a failure.")] = False
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Answers in one piece.")] = False
    insecure: Annotated[bool, typer.Option("--insecure", help="Take any certificate.")] = False
    temperature: Annotated[float | None, _option("Of all texts; default: the server's.")] = None
    top_p: Annotated[float | None, _option("The same.")] = None
    top_k: Annotated[int | None, _option("The same.")] = None
    min_p: Annotated[float | None, _option("The same.")] = None
    frequency_penalty: Annotated[float | None, _option("The same.")] = None
    presence_penalty: Annotated[float | None, _option("The same.")] = None
    repetition_penalty: Annotated[float | None, _option("The same.")] = None
    timeout: Annotated[float, _option("Seconds after which a request has failed.", min=0.001)] = 21600.0
    retries: Annotated[int, _option("How often a failed request is sent again.", min=0, max=100)] = 0
    slo_headers: Annotated[bool, typer.Option("--slo-headers", help="Tell the server promises: x-slo-*-ms.")] = False

    @property
    def url(self) -> str:
        return self.base_url or f"http://{self.host}:{self.port}"

    def _headers(self) -> dict[str, str]:
        """What is given, and a key of the environment."""
        given = dict(pair("--header", each, "=") for each in self.header or ())
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        if key is None or "authorization" in {name.lower() for name in given}:
            return given
        return {"Authorization": f"Bearer {key}", **given}

    def texts(self) -> Texts:
        """Makes prompts. ConfigError for a tokenizer that is no file, unless it is a name of the hub."""
        name = self.tokenizer
        if name is None or name == BYTES or Path(name).exists() or not HUB.fullmatch(name):
            return Texts(name)
        notes.print(
            f"tokenizer {name}: nothing is loaded from a hub; prompts have a word for each token, and "
            "tokens are counted by the server's usage",
            soft_wrap=True,
        )
        return Texts()

    def target(self) -> Target:
        """ConfigError names the option that is wrong."""
        if self.backend not in BACKENDS:
            raise ConfigError(f"--backend {self.backend!r}: {nearest(self.backend, BACKENDS)}")
        body = _object("--extra-body", self.extra_body)
        sampled = {name: value for name in SAMPLED if (value := getattr(self, name)) is not None}
        return Target(
            self.url.rstrip("/").removesuffix("/v1"),
            BACKENDS[self.backend],
            self.endpoint or "",
            self.served_model_name or self.model,
            not self.no_stream,
            self.ignore_eos,
            self._headers(),
            {**sampled, **body},
            SLO_HEADERS if self.slo_headers else {},
            self.timeout,
            self.retries,
            not self.insecure,
        )


@dataclass(frozen=True)
class DataOptions:
    """What requests ask for."""

    dataset_name: Annotated[str, _option("random, sharegpt, custom, prefix_repetition, sessions, images, trace.")] = (
        "random"
    )
    dataset_path: Annotated[Path | None, _option("Of sharegpt, custom and trace.")] = None
    num_prompts: Annotated[int, _option("How many requests; the most of a trace.", min=1, max=10_000_000)] = 1000
    input_len: Annotated[int | None, _option("In place of the data set's own.", min=1)] = None
    output_len: Annotated[int | None, _option("The same.", min=1)] = None
    random_input_len: Annotated[int, _option("Tokens of prompts.", min=1)] = 1024
    random_output_len: Annotated[int, _option("Tokens that are generated.", min=1)] = 128
    random_range_ratio: Annotated[float, _option("Lengths from (1 - r) to (1 + r) times these.", min=0, max=1)] = 0.0
    random_prefix_len: Annotated[int, _option("Tokens before each prompt, the same in all.", min=0)] = 0
    sharegpt_output_len: Annotated[int | None, _option("In place of the answers' lengths.", min=1)] = None
    custom_output_len: Annotated[int, _option("Where lines have no output_tokens.", min=1)] = 256
    no_oversample: Annotated[bool, typer.Option("--no-oversample", help="Of a file no prompt twice.")] = False
    disable_shuffle: Annotated[bool, typer.Option("--disable-shuffle", help="Of a file in its order.")] = False
    prefix_repetition_prefix_len: Annotated[int, _option("Tokens that prompts share.", min=1)] = 256
    prefix_repetition_suffix_len: Annotated[int, _option("Tokens of their own.", min=1)] = 256
    prefix_repetition_num_prefixes: Annotated[int, _option("How many beginnings.", min=1)] = 10
    prefix_repetition_output_len: Annotated[int, _option("Tokens that are generated.", min=1)] = 128
    sessions_groups: Annotated[int, _option("System prompts.", min=1)] = 4
    sessions_system_len: Annotated[int, _option("Tokens of each.", min=0)] = 256
    sessions_question_len: Annotated[int, _option("Tokens of each turn.", min=1)] = 64
    sessions_turns: Annotated[int, _option("Turns of a conversation.", min=1)] = 4
    sessions_think: Annotated[float, _option("Seconds between turns.", min=0, max=86_400)] = 1.0
    image_sizes: Annotated[str, _option("WxH[:weight], with commas between them.")] = "512x512"
    image_steps: Annotated[str, _option("STEPS[:weight], with commas between them.")] = "20"
    image_number: Annotated[int, _option("Images of each request.", min=1, max=10)] = 1
    trace_format: Annotated[str, _option(f"auto, {', '.join(FORMATS)}.")] = "auto"
    trace_start: Annotated[float, _option("Seconds of the trace that are left out.", min=0)] = 0.0
    trace_duration: Annotated[float | None, _option("Seconds of it that are taken.", min=0.001)] = None
    trace_speed: Annotated[float, _option("How much faster it is replayed.", min=1e-6)] = 1.0

    def dataset(self) -> Dataset:
        """ConfigError names the option that is wrong."""
        made = _DATASETS.get(self.dataset_name)
        if made is None:
            raise ConfigError(f"--dataset-name {self.dataset_name!r}: {nearest(self.dataset_name, _DATASETS)}")
        return made(self)

    def _path(self) -> Path:
        if self.dataset_path is None:
            raise ConfigError(f"--dataset-name {self.dataset_name}: needs --dataset-path FILE")
        return self.dataset_path

    def _random(self) -> Dataset:
        lengths = self.input_len or self.random_input_len, self.output_len or self.random_output_len
        return Random(*lengths, self.random_range_ratio, self.random_prefix_len)

    def _repeated(self) -> Dataset:
        return PrefixRepetition(
            self.prefix_repetition_prefix_len,
            self.input_len or self.prefix_repetition_suffix_len,
            self.prefix_repetition_num_prefixes,
            self.output_len or self.prefix_repetition_output_len,
        )

    def _sessions(self) -> Dataset:
        question = self.input_len or self.sessions_question_len
        output = self.output_len or self.random_output_len
        lengths = (self.sessions_groups, self.sessions_system_len, question, output)
        return Sessions(*lengths, self.sessions_turns, self.sessions_think)

    def _sharegpt(self) -> Dataset:
        output = self.output_len or self.sharegpt_output_len
        return PromptFile(self._path(), output, self.no_oversample, not self.disable_shuffle)

    def _custom(self) -> Dataset:
        order = (self.no_oversample, not self.disable_shuffle)
        return PromptFile(self._path(), self.output_len, *order, self.custom_output_len)

    def _images(self) -> Dataset:
        sizes = tuple((*_size(text), weight) for text, weight in _weighted("--image-sizes", self.image_sizes))
        steps = tuple(
            (_whole("--image-steps", text), weight) for text, weight in _weighted("--image-steps", self.image_steps)
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
}


@dataclass(frozen=True)
class PromiseOptions:
    """What requests are promised, from which seed all is drawn, and how the client works."""

    goodput: Annotated[list[str] | None, _option("Promises in ms: ttft:200 tpot:50 e2el:5000.")] = None
    slo_class: Annotated[
        list[str] | None, _option("NAME:share=1,ttft=200,tpot=50,e2e=5000,weight=1,priority=0; several times.")
    ] = None
    seed: Annotated[int, _option("Of all that is drawn.", min=0, max=2**32 - 1)] = 0
    workers: Annotated[int, _option("Processes of the client.", min=1, max=64)] = 1
    from_sent: Annotated[bool, typer.Option("--from-sent", help="Latencies from when requests were sent.")] = False

    def limits(self) -> Limits:
        """Of all requests; ConfigError names what is wrong."""
        given: dict[str, float] = {}
        for each in self.goodput or ():
            name, value = pair("--goodput", each, ":")
            if name not in LIMITS:
                raise ConfigError(f"--goodput {name!r}: {nearest(name, ['ttft', 'tpot', 'e2el'])}")
            given[LIMITS[name]] = _positive(f"--goodput {name}", value) / 1e3
        return Limits(**given)

    def classes(self) -> list[AskClass]:
        """ConfigError names what is wrong."""
        return [_class(each) for each in self.slo_class or ()]


def _class(text: str) -> AskClass:
    name, _, rest = text.partition(":")
    share, limits, params = 1.0, {}, {}
    for each in filter(None, rest.split(",")):
        key, value = pair(f"--slo-class {name}", each, "=")
        where = f"--slo-class {name}: {key}"
        if key == "priority":
            params[key] = _whole(where, value, least=-(2**31))
        elif key == "share":
            share = _positive(where, value)
        elif key == "weight":
            limits[key] = _positive(where, value)
        elif key in LIMITS:
            limits[LIMITS[key]] = _positive(where, value) / 1e3
        else:
            raise ConfigError(f"{where}: {nearest(key, ['share', 'weight', 'priority', *LIMITS])}")
    if not name:
        raise ConfigError(f"--slo-class {shown(text)}: expected NAME:share=1,ttft=200")
    return AskClass(name, share, Limits(**limits), params)


# -- texts of options ---------------------------------------------------------------------------------


def pair(option: str, text: str, between: str) -> tuple[str, str]:
    """A name and its value; ConfigError for anything else."""
    name, found, value = text.partition(between)
    if not found or not name.strip():
        raise ConfigError(f"{option} {shown(text)}: expected NAME{between}VALUE")
    return name.strip(), value.strip()


def _positive(option: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ConfigError(f"{option} {shown(text)}: expected a number above 0")
    return found


def _whole(option: str, text: str, least: int = 1) -> int:
    try:
        found = int(text)
    except ValueError:
        found = least - 1
    if found < least:
        raise ConfigError(f"{option} {shown(text)}: expected a whole number, at least {least}")
    return found


def _object(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{option} {shown(text)}: expected an object of JSON")
    return found


def _weighted(option: str, text: str) -> Sequence[tuple[str, float]]:
    found = []
    for each in text.split(","):
        value, colon, weight = each.partition(":")
        found.append((value.strip(), _positive(option, weight) if colon else 1.0))
    return found


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return _whole("--image-sizes", width), _whole("--image-sizes", height)
