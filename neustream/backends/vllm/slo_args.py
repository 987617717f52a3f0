"""SLOs on their way through vLLM: flat keys in `SamplingParams.extra_args`, read with mistrust.

Who makes them with `slo()` gets errors. What comes in over HTTP is not ours to refuse: a value that
makes no sense is ignored, and said to be so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neustream.core.types import SLO
from neustream.errors import RequestError, nearest

KEYS = ("slo_ttft_ms", "slo_tpot_ms", "slo_total_ms", "slo_weight")
FINISH = "slo_finish"
"""True where a request that will be late is to be served all the same."""
OURS = "slo: "
"""What our scheduler class puts in front of its reasons."""
ALONE = " (even alone)"
"""And behind them, where a promise could not have been kept even alone."""
LARGEST_MS = 1e9
"""Promises beyond this (eleven days) are taken for mistakes."""
LARGEST_WEIGHT = 1e6


def slo(
    *,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    total_ms: float | None = None,
    weight: float | None = None,
    finish: bool = False,
) -> dict[str, float]:
    """The `extra_args` (or `vllm_xargs`) of a request that is promised this.

    Args:
        ttft_ms: its first token, milliseconds after it came.
        tpot_ms: every further token; cumulative: token k is due at `ttft_ms + k * tpot_ms`.
        total_ms: its last token.
        weight: what it is worth, 1 where not given.
        finish: whether it is to be served even if it will be late.

    Raises:
        RequestError: a value that is no number greater than 0, or `tpot_ms` without `ttft_ms`.
    """
    given = dict(zip(KEYS, (ttft_ms, tpot_ms, total_ms, weight), strict=True))
    args = {key: value for key, value in given.items() if value is not None}
    for key, value in args.items():
        if fault := _fault(key, value):
            raise RequestError(f"slo: {key.removeprefix('slo_')} {fault}, got {value!r}")
    if tpot_ms is not None and ttft_ms is None:
        raise RequestError(
            f"slo: tpot_ms={tpot_ms!r} needs ttft_ms: token k is due at ttft_ms + k * tpot_ms"
        )
    return {**args, FINISH: True} if finish else args


def read(extra: Any, default: SLO) -> tuple[SLO, dict[str, str]]:
    """What a request was promised, and what of it was ignored: the story by kind of fault.

    Where it says nothing, `default` holds. The kinds are few, whatever clients send.
    """
    if not extra or not isinstance(extra, Mapping):
        return default, {}
    faults: dict[str, str] = {}
    values: dict[str, Any] = {}
    for key, value in extra.items():
        if not isinstance(key, str) or not key.startswith("slo_"):
            continue
        if told := _ignored(key, value):
            kind, story = told
            faults[kind] = story
        else:
            values[key] = value
    if "slo_tpot_ms" in values and "slo_ttft_ms" not in values and default.first == math.inf:
        faults["slo_tpot_ms without slo_ttft_ms"] = (
            "slo_tpot_ms needs slo_ttft_ms: token k is due at ttft + k * tpot"
        )
        del values["slo_tpot_ms"]
    return (_with(values, default) if values else default), faults


def _ignored(key: str, value: Any) -> tuple[str, str] | None:
    """Why a key cannot be used, as its kind and its story; None: it can be."""
    if key == FINISH:
        said = f"{key} must be true or false"
        return None if value in (True, False) else (said, said)
    if key not in KEYS:
        return "unknown key", f"unknown key {key[:40]!r}; {nearest(key[:40], (*KEYS, FINISH))}"
    if fault := _fault(key, value):
        return f"{key} {fault}", f"{key} {fault}, got {str(value)[:40]!r}"
    return None


def _with(values: Mapping[str, Any], default: SLO) -> SLO:
    """`default` with what a request says in its place."""
    first, step, total, weight = (values.get(key) for key in KEYS)
    return replace(
        default,
        first=default.first if first is None else first / 1e3,
        step=default.step if step is None else step / 1e3,
        total=default.total if total is None else total / 1e3,
        weight=default.weight if weight is None else float(weight),
        finish=bool(values.get(FINISH, default.finish)),
    )


def promised(slo: SLO) -> bool:
    """Whether it promises anything at all."""
    return slo.first < math.inf or slo.total < math.inf


def _fault(key: str, value: Any) -> str:
    """What is wrong with a value, "" if nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    if not value > 0:
        return "must be greater than 0"
    largest = LARGEST_WEIGHT if key == "slo_weight" else LARGEST_MS
    return "" if value <= largest else f"must be at most {largest:.0e}"
