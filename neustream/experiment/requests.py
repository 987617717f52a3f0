"""From a config's workload to requests: arrivals, what each asks for, what it is promised.

Every draw has a seed of its own, so that one key of a config changes one thing. What a trace says of
a request is taken instead of what would be drawn for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neustream.config.fields import MOST_TOKENS, MOST_WORK, Between, Choices, LogNormal
from neustream.config.schema import Experiment, SloClass
from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO, Request
from neustream.core.work import alone_s
from neustream.errors import ConfigError, nearest, shown
from neustream.experiment.trace_rows import Rows, rows_of
from neustream.workload import Row, constant_arrivals, gamma_arrivals, with_burst

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """The requests of a workload in order of arrival.

    `lengths`: outputs after which generations end, by request. `notes`: what the user of a trace
    should know, one sentence each.
    """

    requests: list[Request]
    lengths: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def draw(
    experiment: Experiment,
    graph: Graph,
    profiles: Mapping[str, LatencyProfile],
    params: Callable[[int], Params] = lambda at: {},
) -> Drawn:
    """The workload's requests; `params` adds what a real backend needs. The same config gives the same ones.

    Raises:
        ConfigError: the trace cannot be read, or lacks what the pipeline asks for.
    """
    rows = rows_of(experiment)
    if experiment.llm is not None:
        return _generations(experiment, rows, graph, profiles, params)
    return _runs(experiment, rows, graph, profiles, params)


def _runs(
    experiment: Experiment,
    rows: Rows,
    graph: Graph,
    profiles: Mapping[str, LatencyProfile],
    params: Callable[[int], Params],
) -> Drawn:
    """Requests of a pipeline of stages."""
    load, count = experiment.workload, len(rows.rows)
    rounds = [stage.times for stage in experiment.stages.values() if stage.times]
    if "steps" in rounds:
        rows.need("steps", "steps", example=50)
    asked = []
    for at, (row, drawn) in enumerate(zip(rows.rows, _steps(load.steps, count, load.seed), strict=True)):
        steps = drawn if row.steps is None else row.steps
        given = {**params(at), **rows.sizes(row), **row.params, "steps": steps}
        asked.append(_with_counts(rows, at, given, rounds))
    _check_work(sum(some[name] for some in asked for name in rounds))
    solo = _solo_latencies(experiment, graph, profiles, asked)
    arrivals = _arrivals(experiment, rows, sum(solo))
    requests = []
    for at, slo in enumerate(_classes(experiment, rows)):
        promise = _promise(rows, at, slo, solo[at] + experiment.slo.extra_s)
        requests.append(Request(f"{experiment.name}-{at}", graph, arrivals[at], promise, asked[at]))
    return Drawn(requests, notes=rows.notes)


def _promise(rows: Rows, at: int, slo: SloClass, alone: float) -> SLO:
    """What a request of a pipeline is promised, that takes `alone` seconds and the config's extra."""
    row = rows.rows[at]
    if row.slo_ttft_s is not None or row.slo_tpot_s is not None:
        raise ConfigError(f"{rows.where(at)}: promises of tokens (slo_ttft_*, slo_tpot_*) are for an llm")
    total = _promised(row.slo_s or slo.total_s, slo.scale, alone)
    if not total > 0:
        raise ConfigError(f"slo.scale: request {at} has no work, so its SLO would be 0 s; use slo.total_s")
    return SLO(total, weight=slo.weight, name=slo.name)


def _generations(
    experiment: Experiment,
    rows: Rows,
    graph: Graph,
    profiles: Mapping[str, LatencyProfile],
    params: Callable[[int], Params],
) -> Drawn:
    """Requests of a language model, and the outputs after which each generation ends."""
    asked = _texts(experiment, rows, params)
    ends = [min(some.pop("output_tokens"), some["max_tokens"]) for some in asked]
    _check_work(sum(ends))
    prefill, decode = (profiles[f"llm.{stage}"] for stage in ("prefill", "decode"))
    first = [prefill.latency(1, n, n * n) for n in (float(some["prompt_tokens"]) for some in asked)]
    step = [decode.latency(1, some["prompt_tokens"] + some["max_tokens"] / 2) for some in asked]
    alone = sum(a + b * (n - 1) for a, b, n in zip(first, step, ends, strict=True))
    arrivals = _arrivals(experiment, rows, alone)
    requests = []
    for at, slo in enumerate(_classes(experiment, rows)):
        row, extra = rows.rows[at], experiment.slo.extra_s
        whole = first[at] + step[at] * (asked[at]["max_tokens"] - 1)
        promise = {
            "total": _promised(row.slo_s or slo.total_s, slo.scale, whole + extra),
            "first": _promised(row.slo_ttft_s or slo.first_s, slo.first_scale, first[at] + extra),
            "step": _promised(row.slo_tpot_s or slo.step_s, slo.step_scale, step[at]),
        }
        if promise["step"] < math.inf and promise["first"] == math.inf:
            raise ConfigError(f"{rows.where(at)}: slo_tpot_* needs slo_ttft_*: token k is due at TTFT + k * TPOT")
        made = SLO(**promise, weight=slo.weight, name=slo.name)
        requests.append(Request(f"{experiment.name}-{at}", graph, arrivals[at], made, asked[at]))
    lengths = {request.id: end for request, end in zip(requests, ends, strict=True)}
    return Drawn(requests, lengths, rows.notes)


def _texts(experiment: Experiment, rows: Rows, params: Callable[[int], Params]) -> list[dict[str, Any]]:
    """Numbers of tokens, and what a real backend needs.

    Where neither the trace nor the config has `max_tokens`, all may have as many as the longest output.
    """
    load, count = experiment.workload, len(rows.rows)
    rows.need("prompt_tokens", "prompt", example=512)
    rows.need("output_tokens", "output", example=128)
    prompts = _tokens(load.prompt, count, load.seed, 2)
    outputs = _tokens(load.output, count, load.seed, 3)
    most = load.max_tokens
    if load.trace is not None and "max_tokens" not in load.model_fields_set:
        most = max(row.output_tokens or drawn for row, drawn in zip(rows.rows, outputs, strict=True))
    asked = []
    for at, (row, prompt, output) in enumerate(zip(rows.rows, prompts, outputs, strict=True)):
        numbers = {
            "prompt_tokens": row.prompt_tokens or prompt,
            "output_tokens": row.output_tokens or output,
            "max_tokens": row.max_tokens or most,
        }
        if min(numbers.values()) < 1:
            raise ConfigError(f"{rows.where(at)}: prompt_tokens, output_tokens and max_tokens must be 1 or more")
        asked.append({**params(at), **row.params, **numbers})
    return asked


def _promised(seconds: float | None, scale: float | None, alone: float) -> float:
    return seconds if seconds is not None else math.inf if scale is None else scale * alone


def _tokens(tokens: int | Between | Choices | LogNormal, count: int, seed: int, stream: int) -> list[int]:
    """Numbers of tokens, drawn from a stream of their own."""
    draw = np.random.default_rng([seed, stream])
    if isinstance(tokens, LogNormal):
        values = np.exp(draw.normal(math.log(tokens.median), tokens.sigma, count))
        return [int(x) for x in np.clip(np.rint(values), tokens.min, tokens.max)]
    if isinstance(tokens, Between):
        return [int(x) for x in draw.integers(tokens.min, tokens.max + 1, count)]
    if isinstance(tokens, Choices):
        return [int(x) for x in draw.choice(tokens.choices, count)]
    return [tokens] * count


def _with_counts(rows: Rows, at: int, request: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The request, if the parameters that loops ask for are whole numbers."""
    for name in names:
        value = request.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TOKENS:
            what = f"{name!r} is what a stage's `times` ask for, so a count of at most {MOST_TOKENS}"
            raise ConfigError(f"{rows.where(at)}: {what}; got {shown(value)}")
    return request


def _check_work(steps: int) -> None:
    if steps > MOST_WORK:
        raise ConfigError(f"workload: its requests ask for {steps} steps in all; allowed: at most {MOST_WORK}")


def _solo_latencies(
    experiment: Experiment, graph: Graph, profiles: Mapping[str, LatencyProfile], asked: Sequence[Params]
) -> list[float]:
    """Each request's time alone; computed once for those that agree in what their loops ask for."""
    known: dict[tuple[Any, ...], float] = {}
    out = []
    for request in asked:
        key = tuple(request[stage.times] for stage in experiment.stages.values() if stage.times)
        if key not in known:
            known[key] = alone_s(graph, request, profiles)
        out.append(known[key])
    if experiment.workload.load is not None and not sum(out) > 0:
        raise ConfigError("workload.load: the requests have no work, so no rate makes that load; use workload.rate")
    return out


def _arrivals(experiment: Experiment, rows: Rows, alone: float) -> list[float]:
    """When requests come that take `alone` seconds one after the other."""
    load, count = experiment.workload, len(rows.rows)
    if load.arrivals == "trace":
        return [row.arrival_s or 0.0 for row in rows.rows]
    rate = load.rate if load.load is None else load.load * count / alone
    if load.arrivals == "constant":
        arrivals = constant_arrivals(count, rate=rate)
    else:
        arrivals = gamma_arrivals(count, rate=rate, cv=load.cv, seed=load.seed)
    changed: NDArray[np.float64] = arrivals if load.burst is None else with_burst(arrivals, **load.burst.model_dump())
    return [float(at) for at in changed]


def _steps(steps: int | Between | Choices, count: int, seed: int) -> list[int]:
    draw = np.random.RandomState(seed)
    if isinstance(steps, Between):
        return [int(x) for x in draw.randint(steps.min, steps.max + 1, count)]
    if isinstance(steps, Choices):
        return [int(x) for x in draw.choice(steps.choices, count)]
    return [steps] * count


def _classes(experiment: Experiment, rows: Rows) -> list[SloClass]:
    """Each request's class of promises: the one that its row names, or one drawn by share."""
    slo, count = experiment.slo, len(rows.rows)
    if slo.classes is None:
        given = slo.model_dump(exclude_none=True, exclude={"extra_s"})
        drawn = [SloClass(**given)] * count
    else:
        share = np.array([c.share for c in slo.classes])
        draw = np.random.default_rng([experiment.workload.seed, 1])  # a stream apart from arrivals and steps
        chosen = draw.choice(len(share), count, p=share / share.sum())
        drawn = [slo.classes[int(at)] for at in chosen]
    named = {known.name: known for known in slo.classes or () if known.name}
    for at, row in enumerate(rows.rows):
        if row.slo_class is not None and row.slo_class not in named:
            hint = nearest(row.slo_class, named)
            raise ConfigError(f"{rows.where(at)}: slo_class {row.slo_class!r} is no class of the config's slo; {hint}")
    return [_named(row, named, other) for row, other in zip(rows.rows, drawn, strict=True)]


def _named(row: Row, named: Mapping[str, SloClass], other: SloClass) -> SloClass:
    return other if row.slo_class is None else named[row.slo_class]
