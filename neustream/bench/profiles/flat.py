"""guidellm's flat scenarios of 0.3 to 0.6: the same as one of today, by other names."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from neustream.bench.profiles.guidellm import ERRORS, FILES, WHOLE
from neustream.bench.profiles.marks import Ignored, Refused, Section, Seed
from neustream.config.yaml_file import parse_value
from neustream.errors import ConfigError

LOADED = Ignored("of data that is loaded")
SHOWN = Ignored("what its client shows")
FORMATS = {
    "text_completions": "/v1/completions",
    "chat_completions": "/v1/chat/completions",
    "/v1/completions": "/v1/completions",
    "/v1/chat/completions": "/v1/chat/completions",
}
Without = Annotated[Any, WHOLE, BeforeValidator(lambda value: value or None)]
"""What is left out at the beginning or the end; 0: nothing."""


class Flat(Section):
    """A whole profile."""

    target: str | None = None
    model: str | None = None
    backend: Literal["openai_http", "openai"] = "openai_http"
    backend_kwargs: dict[str, Any] | None = None
    backend_args: dict[str, Any] | None = None
    request_type: str | None = None
    request_format: str | None = None
    profile: str | None = None
    rate_type: str | None = None
    rate: Any = None
    data: Any = None
    data_args: Annotated[Any, LOADED] = None
    data_samples: Annotated[int | None, LOADED] = None
    data_sampler: Annotated[str | None, LOADED] = None
    data_num_workers: Annotated[int | None, LOADED] = None
    data_column_mapper: Annotated[Any, LOADED] = None
    data_request_formatter: Annotated[Any, LOADED] = None
    data_preprocessors: Annotated[Any, LOADED] = None
    data_preprocessors_kwargs: Annotated[Any, LOADED] = None
    data_finalizer: Annotated[Any, LOADED] = None
    benchmark_cls: Annotated[Any, Ignored("how its results are kept")] = None
    data_collator: Annotated[Any, LOADED] = None
    dataloader_kwargs: Annotated[Any, LOADED] = None
    processor: str | None = None
    processor_args: Annotated[Any, Ignored("nothing is loaded from a hub")] = None
    random_seed: Seed = 42
    max_requests: Any = None
    max_seconds: Any = None
    max_duration: Any = None
    max_errors: Annotated[Any, ERRORS] = None
    max_error_rate: Annotated[Any, ERRORS] = None
    max_global_error_rate: Annotated[Any, ERRORS] = None
    over_saturation: Annotated[
        Any, Refused("a load is not ended because the server falls behind")
    ] = None
    warmup: Without = None
    warmup_percent: Without = None
    cooldown: Without = None
    cooldown_percent: Without = None
    rampup: float = 0.0
    max_concurrency: Any = None
    headers: dict[str, str] | None = None
    prefer_response_metrics: Annotated[bool, Ignored("the server's usage is believed first")] = True
    sample_requests: Annotated[int | None, Ignored("a record of every request is kept")] = None
    output_path: Annotated[Any, FILES] = None
    output_dir: Annotated[Any, FILES] = None
    output_formats: Annotated[Any, FILES] = None
    output_extras: Annotated[Any, FILES] = None
    output_sampling: Annotated[Any, FILES] = None
    outputs: Annotated[Any, FILES] = None
    disable_progress: Annotated[bool, SHOWN] = False
    disable_console: Annotated[bool, SHOWN] = False
    disable_console_outputs: Annotated[bool, SHOWN] = False
    disable_console_interactive: Annotated[bool, SHOWN] = False
    display_scheduler_stats: Annotated[bool, SHOWN] = False

    def spec(self) -> dict[str, Any]:
        """As `spec` of a scenario has it."""
        spec: dict[str, Any] = {
            "backend": self._backend(),
            "profile": self._profile(),
            "constraints": self._constraints(),
            "data": [self._data(each) for each in self._listed()],
            "seed": {"kind": "static", "value": self.random_seed},
        }
        if self.processor is not None:
            spec["tokenizer"] = {"model": self.processor}
        return spec

    def _backend(self) -> dict[str, Any]:
        given = self.request_type or self.request_format or "chat_completions"
        if given not in FORMATS:
            raise ConfigError(
                f"request_type: {given!r} is not spoken; allowed: {', '.join(FORMATS)}"
            )
        more = {**(self.backend_kwargs or {}), **(self.backend_args or {})}
        if self.headers:
            more["extras"] = {**(more.get("extras") or {}), "headers": self.headers}
        named = {"target": self.target, "model": self.model, "request_format": FORMATS[given]}
        return {**{key: value for key, value in named.items() if value is not None}, **more}

    def _profile(self) -> dict[str, Any]:
        kind = self.profile or self.rate_type or "sweep"
        found: dict[str, Any] = {"kind": kind, "rampup_duration": self.rampup}
        rate = {"concurrent": "streams", "throughput": "max_concurrency", "sweep": "sweep_size"}
        if self.rate is not None and kind != "synchronous":
            first = self.rate[0] if isinstance(self.rate, list) and self.rate else self.rate
            found[rate.get(kind, "rate")] = first if kind in ("throughput", "sweep") else self.rate
        if self.max_concurrency is not None:
            found["max_concurrency"] = self.max_concurrency
        return found

    def _constraints(self) -> list[dict[str, Any]]:
        seconds = self.max_seconds if self.max_seconds is not None else self.max_duration
        found = []
        if self.max_requests is not None:
            found.append({"kind": "max_requests", "count": self.max_requests})
        if seconds is not None:
            found.append({"kind": "max_duration", "seconds": seconds})
        return found

    def _listed(self) -> list[Any]:
        if self.data is None:
            raise ConfigError("data: is needed, as prompt_tokens=128,output_tokens=64 or a section")
        return self.data if isinstance(self.data, list) else [self.data]

    def _data(self, given: Any) -> dict[str, Any]:
        """Synthetic texts as a section or as `key=value,key=value`; else the name of a data set."""
        if isinstance(given, str) and given.lstrip().startswith("{"):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                raise ConfigError(f"data: {given[:60]!r} is no JSON") from None
        if isinstance(given, str) and "=" in given:
            pairs = [pair.partition("=") for pair in given.split(",") if pair.strip()]
            given = {
                key.strip(): parse_value(f"data: {key.strip()}", value) for key, _, value in pairs
            }
        if isinstance(given, dict):
            kept = {key: value for key, value in given.items() if key not in ("samples", "source")}
            return {"kind": "synthetic_text", **kept}
        return {"kind": "huggingface", "source": given}
