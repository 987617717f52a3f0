"""What a request is promised: from its headers, its body, its class and the defaults."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from neustream.core.types import SLO
from neustream.errors import shown
from neustream.server.bodies import DAY_MS, AgentBody, AnyAsk, Promise, TextBody
from neustream.server.config import ClassConfig, PromiseConfig
from neustream.server.errors import HTTPError

HEADERS = {
    "ttft_ms": ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms"),
    "tpot_ms": ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms"),
    "e2e_ms": ("x-slo-e2e-ms",),
}
"""By budget, the headers that name it; the first that is there counts."""
GRPC = {"H": 3_600_000.0, "M": 60_000.0, "S": 1000.0, "m": 1.0, "u": 1e-3, "n": 1e-6}
"""Milliseconds of the units of `grpc-timeout`."""
NAMES = ("ttft_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True)
class Promised:
    """What a request is promised.

    Args:
        slo: for the scheduler.
        timeout_s: after so long it is cancelled; inf: never.
        warnings: what of the headers was not taken.
        report: whether the answer is to say how it went.
    """

    slo: SLO
    timeout_s: float = math.inf
    warnings: list[str] = field(default_factory=list)
    report: bool = False

    @property
    def header(self) -> str:
        """As the answer tells it back."""
        slo = self.slo
        parts = {"ttft": slo.first, "tpot": slo.step, "e2e": slo.total}
        told = [f"{name}={_ms(seconds)}" for name, seconds in parts.items()]
        return ";".join([*told, f"class={slo.name}"] if slo.name else told)


def _ms(seconds: float) -> str:
    return "inf" if math.isinf(seconds) else f"{seconds * 1e3:g}"


def promised(
    headers: Mapping[str, str],
    body: AnyAsk,
    config: PromiseConfig,
    defaults: SLO,
) -> Promised:
    """The promise of a request; HTTPError for what its body asks and nobody can promise.

    For each budget the smallest that header, body and timeout name counts, else the class's, else
    the model's. The operator's floors clip it. What is wrong in a header is not taken, and told.
    """
    warnings: list[str] = []
    said = body.slo or Promise()
    name, chosen = _class(headers, said, config, warnings)
    asked = _asked(headers, body, said, warnings)
    timeout_s = _timeout_s(headers, warnings)
    if timeout_s < math.inf:
        asked["e2e_ms"] = min(asked.get("e2e_ms", math.inf), timeout_s * 1e3)
    budgets = {each: _default(each, chosen, defaults) for each in NAMES}
    budgets |= _above_floors(asked, chosen, warnings)
    if not isinstance(body, TextBody | AgentBody):
        _check_image(said, headers, warnings)
        budgets["ttft_ms"] = budgets["tpot_ms"] = math.inf
    if budgets["tpot_ms"] < math.inf and budgets["ttft_ms"] == math.inf:
        budgets["ttft_ms"] = config.fallback_ttft_ms
    theirs = _of_vllm(body.vllm_xargs or {}, "slo_weight") if isinstance(body, TextBody) else None
    asked_weight = said.weight or theirs or _number(headers, "x-slo-weight", warnings)
    if asked_weight is not None and asked_weight > config.max_weight:
        warnings.append(f"weight {asked_weight:g} is above the most, {config.max_weight:g}")
    weight = asked_weight or chosen.weight
    slo = SLO(
        total=budgets["e2e_ms"] / 1e3,
        first=budgets["ttft_ms"] / 1e3,
        step=budgets["tpot_ms"] / 1e3,
        weight=min(weight, config.max_weight),
        name=name,
        finish=chosen.on_miss == "finish",
    )
    return Promised(slo, timeout_s, warnings, said.report)


def _above_floors(asked: Mapping[str, float], chosen: ClassConfig, warnings: list[str]) -> dict[str, float]:
    """What is asked, or the operator's floor where that is less."""
    budgets = {}
    for each, value in asked.items():
        floor = getattr(chosen.floor, each) or 0.0
        if value < floor:
            warnings.append(f"{each} {value:g} is below the floor of {floor:g}")
        budgets[each] = max(value, floor)
    return budgets


def _class(
    headers: Mapping[str, str], said: Promise, config: PromiseConfig, warnings: list[str]
) -> tuple[str, ClassConfig]:
    if said.class_ is not None:
        if said.class_ not in config.classes:
            known = ", ".join(sorted(config.classes)) or "none"
            text = f"slo.class: no class {shown(said.class_)}; classes: {known}"
            raise HTTPError(400, text, "invalid", "slo.class")
        return said.class_, config.classes[said.class_]
    name = headers.get("x-slo-class")
    if name is not None and name in config.classes:
        return name, config.classes[name]
    if name is not None:
        warnings.append("x-slo-class: no such class")
    return "", ClassConfig()


def _default(name: str, chosen: ClassConfig, defaults: SLO) -> float:
    of_class: float | None = getattr(chosen, name)
    if of_class is not None:
        return of_class
    seconds = {"ttft_ms": defaults.first, "tpot_ms": defaults.step, "e2e_ms": defaults.total}
    return seconds[name] * 1e3


def _asked(headers: Mapping[str, str], body: AnyAsk, said: Promise, warnings: list[str]) -> dict[str, float]:
    """The smallest of each budget that headers and body name."""
    found: dict[str, float] = {}

    def take(name: str, value: float | None) -> None:
        if value is not None:
            found[name] = min(found.get(name, math.inf), value)

    for name in NAMES:
        take(name, getattr(said, name))
        header = next((each for each in HEADERS[name] if each in headers), None)
        if header is not None:
            take(name, _number(headers, header, warnings))
    take("e2e_ms", body.slo_ms)
    if isinstance(body, TextBody):
        for name, key in zip(NAMES, ("slo_ttft_ms", "slo_tpot_ms", "slo_total_ms"), strict=True):
            take(name, _of_vllm(body.vllm_xargs or {}, key))
    return found


def _of_vllm(arguments: Mapping[str, object], key: str) -> float | None:
    value = arguments.get(key)
    if value is None:
        return None
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not 0.001 <= float(value) <= DAY_MS:  # type: ignore[arg-type]
        text = f"vllm_xargs.{key}: a number from 0.001 to {DAY_MS:.0f}, got {shown(value)}"
        raise HTTPError(400, text, "invalid", f"vllm_xargs.{key}")
    return float(value)  # type: ignore[arg-type]


def _number(headers: Mapping[str, str], name: str, warnings: list[str]) -> float | None:
    """A header's number above 0; None, with a warning, for what is none."""
    text = headers.get(name)
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text.strip()) and 0.001 <= float(text) <= DAY_MS:
        return float(text)
    warnings.append(f"{name}: not a number above 0 and up to a day")
    return None


def _timeout_s(headers: Mapping[str, str], warnings: list[str]) -> float:
    """Seconds after which a request is cancelled, by the headers of timeouts."""
    found = math.inf
    value = _number(headers, "request-timeout-ms", warnings)
    if value is not None:
        found = value / 1e3
    text = headers.get("grpc-timeout")
    if text is not None:
        match = re.fullmatch(r"([0-9]{1,8})([HMSmun])", text.strip())
        if match and int(match[1]):
            found = min(found, int(match[1]) * GRPC[match[2]] / 1e3)
        else:
            warnings.append("grpc-timeout: not a number of up to 8 digits and a unit")
    return found


def _check_image(said: Promise, headers: Mapping[str, str], warnings: list[str]) -> None:
    for name in ("ttft_ms", "tpot_ms"):
        if getattr(said, name) is not None:
            raise HTTPError(400, f"slo.{name}: an image has no tokens", "invalid", f"slo.{name}")
        warnings += [f"{header}: an image has no tokens" for header in HEADERS[name] if header in headers]


def longest_ms(waits: Sequence[float | None]) -> float | None:
    """The longest of some waits, in milliseconds; None: one of them is not known."""
    known = [wait for wait in waits if wait is not None]
    return round(max(known) * 1e3, 3) if known and len(known) == len(waits) else None
