"""Whom to ask, and what is promised: options of `neustream bench serve` and `search`, under vLLM's names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.bench.plan import Api, Target
from neustream.commands.bench_parsing import object_of, option, pair, whole
from neustream.commands.bench_reporting import SentOption
from neustream.commands.printing import notes
from neustream.errors import ConfigError, nearest, shown
from neustream.workload.asks import Limits
from neustream.workload.mixing import AskClass
from neustream.workload.numbers import positive
from neustream.workload.texts import BYTES, Texts

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
TOKENIZER_MODES = ("auto", "hf")
"""Both are a tokenizer.json; those of other kinds are not read."""
KEYS = ("NEUSTREAM_API_KEY", "OPENAI_API_KEY")
"""Variables that hold a key for the server; the first that is set counts."""
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CLASS_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


@dataclass(frozen=True)
class ServerOptions:
    """Whom to ask, and how."""

    backend: Annotated[str, option(f"{', '.join(BACKENDS)}.", names=("--backend", "--endpoint-type"))] = "openai"
    base_url: Annotated[str | None, option("Of the server; else --host and --port.")] = None
    host: Annotated[str, option("Of the server.")] = "127.0.0.1"
    port: Annotated[int, option("Of the server.", min=1, max=65535)] = 8000
    endpoint: Annotated[str | None, option("In place of the route that the backend has.")] = None
    header: Annotated[list[str] | None, option("KEY=VALUE of each request.")] = None
    model: Annotated[str, typer.Option("--model", "-m", help="In each body; default: the server's first.")] = ""
    served_model_name: Annotated[str, option("The same, where --model names a tokenizer.")] = ""
    tokenizer: Annotated[str | None, option("A tokenizer.json, a folder, or bytes; else a token a word.")] = None
    tokenizer_mode: Annotated[str, typer.Option(hidden=True)] = "auto"
    request_id_prefix: Annotated[str, option("Requests have the header x-request-id, which begins so.")] = ""
    extra_body: Annotated[str, option("JSON that is added to each body.")] = "{}"
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Fewer tokens than asked for are a failure.")] = False
    whole: Annotated[bool, typer.Option("--whole", help="Answers in one piece, no streams.")] = False
    insecure: Annotated[bool, typer.Option("--insecure", help="Take any certificate.")] = False
    temperature: Annotated[float | None, option("Of all texts; default: the server's.")] = None
    top_p: Annotated[float | None, option("The same.")] = None
    top_k: Annotated[int | None, option("The same.")] = None
    min_p: Annotated[float | None, option("The same.")] = None
    frequency_penalty: Annotated[float | None, option("The same.")] = None
    presence_penalty: Annotated[float | None, option("The same.")] = None
    repetition_penalty: Annotated[float | None, option("The same.")] = None
    logprobs: Annotated[int | None, option("Likelihoods of each token are asked for.", min=0, max=20)] = None
    timeout: Annotated[float, option("Seconds after which a request has failed.", min=0.001)] = 21600.0
    retries: Annotated[int, option("How often a failed request is sent again.", min=0, max=100)] = 0
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
        if self.tokenizer_mode not in TOKENIZER_MODES:
            raise ConfigError(
                f"--tokenizer-mode {self.tokenizer_mode!r}: {nearest(self.tokenizer_mode, TOKENIZER_MODES)}"
            )
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
        body = object_of("--extra-body", self.extra_body)
        sampled: dict[str, Any] = {name: value for name in SAMPLED if (value := getattr(self, name)) is not None}
        if self.logprobs is not None and BACKENDS[self.backend] == "chat":
            sampled |= {"logprobs": True, "top_logprobs": self.logprobs}
        elif self.logprobs is not None:
            sampled["logprobs"] = self.logprobs
        return Target(
            self.url.rstrip("/").removesuffix("/v1"),
            BACKENDS[self.backend],
            self.endpoint or "",
            self.served_model_name or self.model,
            not self.whole,
            self.ignore_eos,
            self._headers(),
            {**sampled, **body},
            SLO_HEADERS if self.slo_headers else {},
            self.timeout,
            self.retries,
            not self.insecure,
            id_prefix=self.request_id_prefix,
        )


@dataclass(frozen=True)
class PromiseOptions:
    """What requests are promised, from which seed all is drawn, and how the client works."""

    goodput: Annotated[list[str] | None, option("Promises in ms: ttft:200 tpot:50 e2el:5000.")] = None
    slo_class: Annotated[
        list[str] | None, option("NAME:share=1,ttft=200,tpot=50,e2e=5000,weight=1,priority=0; several times.")
    ] = None
    seed: Annotated[int, option("Of all that is drawn.", min=0, max=2**32 - 1)] = 0
    workers: Annotated[int, option("Processes of the client.", min=1, max=64)] = 1
    from_sent: SentOption = False

    def limits(self) -> Limits:
        """Of all requests; ConfigError names what is wrong."""
        given: dict[str, float] = {}
        for each in self.goodput or ():
            name, value = pair("--goodput", each, ":")
            if name not in LIMITS:
                raise ConfigError(f"--goodput {name!r}: {nearest(name, ['ttft', 'tpot', 'e2el'])}")
            given[LIMITS[name]] = positive(f"--goodput {name}", value) / 1e3
        return Limits(**given)

    def classes(self) -> list[AskClass]:
        """ConfigError names what is wrong."""
        found = [_class(each) for each in self.slo_class or ()]
        names = [each.name for each in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--slo-class {twice}: twice; expected different names")
        return found


def _class(text: str) -> AskClass:
    name, _, rest = text.partition(":")
    share, limits, params = 1.0, {}, {}
    for each in filter(None, rest.split(",")):
        key, value = pair(f"--slo-class {name}", each, "=")
        where = f"--slo-class {name}: {key}"
        if key == "priority":
            params[key] = whole(where, value, least=-(2**31))
        elif key == "share":
            share = positive(where, value)
        elif key == "weight":
            limits[key] = positive(where, value)
        elif key in LIMITS:
            limits[LIMITS[key]] = positive(where, value) / 1e3
        else:
            raise ConfigError(f"{where}: {nearest(key, ['share', 'weight', 'priority', *LIMITS])}")
    if not CLASS_NAME.fullmatch(name):
        raise ConfigError(f"--slo-class {shown(text)}: expected NAME:share=1,ttft=200")
    return AskClass(name, share, Limits(**limits), params)
