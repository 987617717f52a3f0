"""From a config's workload to requests: arrivals, what each asks for, what it is promised.

Every draw has a seed of its own, so that one key of a config changes one thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neustream.config import Experiment, SloClass
from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO, Request
from neustream.core.work import alone_s
from neustream.errors import ConfigError
from neustream.explain import shortened
from neustream.fields import MOST_TOKENS, MOST_WORK, Between, Choices, LogNormal
from neustream.workload import Row, constant_arrivals, gamma_arrivals, load_trace, with_burst

Params = Mapping[str, Any]


def build_requests(
    experiment: Experiment,
    graph: Graph,
    profiles: Mapping[str, LatencyProfile],
    params: Callable[[int], Params] = lambda at: {},
) -> list[Request]:
    """The workload's requests in order of arrival; `params` adds what a real backend needs."""
    if experiment.llm is not None:
        return [request for request, _ in build_generations(experiment, graph, profiles, params)]
    load = experiment.workload
    count = load.requests
    trace = _trace(experiment) if load.arrivals == "trace" else [Row(0.0)] * count
    steps = [
        drawn if row.steps is None else row.steps
        for row, drawn in zip(trace, _steps(load.steps, len(trace), load.seed), strict=True)
    ]
    rounds = [stage.times for stage in experiment.stages.values() if stage.times]
    asked = [_with_counts(at, {**params(at), **row.params, "steps": steps[at]}, rounds) for at, row in enumerate(trace)]
    _check_work(sum(some[name] for some in asked for name in rounds))
    solo = _solo_latencies(experiment, graph, profiles, asked)
    if load.arrivals == "trace":
        arrivals = [row.arrival for row in trace]
    else:
        rate = load.rate if load.load is None else load.load * count / sum(solo)
        arrivals = [float(at) for at in _arrivals(experiment, rate)]
    requests = []
    for at, (row, slo) in enumerate(zip(trace, _classes(experiment, len(trace)), strict=True)):
        total = _promised(row.slo_s or slo.total_s, slo.scale, experiment.slo.extra_s + solo[at])
        if not total > 0:
            raise ConfigError(f"slo.scale: request {at} has no work, so its SLO would be 0 s; use slo.total_s")
        promise = SLO(total, weight=slo.weight, name=slo.name)
        requests.append(Request(f"{experiment.name}-{at}", graph, arrivals[at], promise, asked[at]))
    return requests


def build_generations(
    experiment: Experiment,
    graph: Graph,
    profiles: Mapping[str, LatencyProfile],
    params: Callable[[int], Params] = lambda at: {},
) -> list[tuple[Request, int]]:
    """An LLM's requests in order of arrival, each with the outputs after which its generation ends."""
    load = experiment.workload
    trace = _trace(experiment) if load.arrivals == "trace" else [Row(0.0)] * load.requests
    count = len(trace)
    drawn = [_tokens(load.prompt, count, load.seed, 2), _tokens(load.output, count, load.seed, 3)]
    asked, ends = [], []
    for at, (row, prompt, output) in enumerate(zip(trace, *drawn, strict=True)):
        numbers = {"prompt_tokens": prompt, "output_tokens": output, "max_tokens": load.max_tokens}
        given = _with_counts(at, {**numbers, **params(at), **row.params}, list(numbers))
        if min(given[name] for name in numbers) < 1:
            raise ConfigError(f"request {at}: prompt_tokens, output_tokens and max_tokens must be 1 or more")
        ends.append(min(given.pop("output_tokens"), given["max_tokens"]))
        asked.append(given)
    _check_work(sum(ends))
    prefill, decode = (profiles[f"llm.{stage}"] for stage in ("prefill", "decode"))
    first = [prefill.latency(1, n, n * n) for n in (float(some["prompt_tokens"]) for some in asked)]
    step = [decode.latency(1, some["prompt_tokens"] + some["max_tokens"] / 2) for some in asked]
    if load.arrivals == "trace":
        arrivals = [row.arrival for row in trace]
    else:
        alone = sum(a + b * (n - 1) for a, b, n in zip(first, step, ends, strict=True))
        rate = load.rate if load.load is None else load.load * count / alone
        arrivals = [float(at) for at in _arrivals(experiment, rate)]
    requests = []
    for at, (row, slo) in enumerate(zip(trace, _classes(experiment, count), strict=True)):
        whole = first[at] + step[at] * (asked[at]["max_tokens"] - 1)
        promise = SLO(
            total=_promised(row.slo_s or slo.total_s, slo.scale, whole + experiment.slo.extra_s),
            first=_promised(slo.first_s, slo.first_scale, first[at] + experiment.slo.extra_s),
            step=_promised(slo.step_s, slo.step_scale, step[at]),
            weight=slo.weight,
            name=slo.name,
        )
        request = Request(f"{experiment.name}-{at}", graph, arrivals[at], promise, asked[at])
        requests.append((request, ends[at]))
    return requests


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


def _with_counts(at: int, request: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The request with the parameters that loops ask for as whole numbers (a CSV file has texts)."""
    for name in names:
        value = request.get(name)
        if isinstance(value, str) and value.isdecimal() and len(value) < 20:
            request[name] = value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TOKENS:
            what = f"{name!r} is what a stage's `times` ask for, so a count of at most {MOST_TOKENS}"
            raise ConfigError(f"request {at}: {what}; got {shortened(value)}")
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


def _trace(experiment: Experiment) -> list[Row]:
    load = experiment.workload
    assert load.file is not None
    rows = load_trace(load.file)
    if "requests" not in load.model_fields_set:
        return rows
    if load.requests > len(rows):
        raise ConfigError(
            f"workload.requests is {load.requests}, but {load.file} has {len(rows)} rows; "
            "for all of them drop it: --set workload.requests=null"
        )
    return rows[: load.requests]


def _arrivals(experiment: Experiment, rate: float) -> NDArray[np.float64]:
    load = experiment.workload
    if load.arrivals == "constant":
        arrivals = constant_arrivals(load.requests, rate=rate)
    else:
        arrivals = gamma_arrivals(load.requests, rate=rate, cv=load.cv, seed=load.seed)
    return arrivals if load.burst is None else with_burst(arrivals, **load.burst.model_dump())


def _steps(steps: int | Between | Choices, count: int, seed: int) -> list[int]:
    draw = np.random.RandomState(seed)
    if isinstance(steps, Between):
        return [int(x) for x in draw.randint(steps.min, steps.max + 1, count)]
    if isinstance(steps, Choices):
        return [int(x) for x in draw.choice(steps.choices, count)]
    return [steps] * count


def _classes(experiment: Experiment, count: int) -> list[SloClass]:
    slo = experiment.slo
    if slo.classes is None:
        given = slo.model_dump(exclude_none=True, exclude={"extra_s"})
        return [SloClass(**given)] * count
    share = np.array([c.share for c in slo.classes])
    draw = np.random.default_rng([experiment.workload.seed, 1])  # a stream apart from arrivals and steps
    chosen = draw.choice(len(share), count, p=share / share.sum())
    return [slo.classes[int(at)] for at in chosen]
