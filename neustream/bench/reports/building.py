"""A run as a report."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neustream.bench.records import Since
from neustream.bench.reports import promises
from neustream.bench.reports.figures import LATENCIES, Figures, instant, only_mean, statistics
from neustream.bench.reports.observability import Observability, Report, Results
from neustream.bench.reports.over_time import series
from neustream.bench.reports.scenario import (
    Accelerator,
    Component,
    ComponentMetadata,
    Engine,
    Generic,
    LoadMetadata,
    LoadSection,
    LoadStandardized,
    Model,
    Native,
    Parallelism,
    Scenario,
)
from neustream.bench.reports.schema import (
    Aggregate,
    Latency,
    RequestPerformance,
    Requests,
    RunSection,
    RunTime,
    SessionPerformance,
    Throughput,
)
from neustream.bench.reports.scraping import component
from neustream.bench.reports.sessions import sessions
from neustream.bench.runs import Run

SERVER = "server"
"""The label of who served, unless the user names another."""
SCRAPED = "server_metrics"
"""The key of a run's `meta` under which samples of the server's own metrics lie."""
UNKNOWN = "unknown"
"""What a client cannot see of a server."""


@dataclass(frozen=True)
class About:
    """What is said beside the runs of an experiment.

    Attributes:
        description: of the experiment.
        config: how the load was asked for: the profile, or the options of a command.
        stack: who served, as reports have it; empty: an engine of which only the model is known.
        since: what latencies count from.
        constraints: limits in seconds beside those of the requests: itl, ntpot.
        keywords: to find it by.
    """

    description: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    stack: Sequence[Component] = ()
    since: Since = "scheduled"
    constraints: Mapping[str, float] = field(default_factory=dict)
    keywords: Sequence[str] = ()


NOTHING = About()


def reports(runs: Sequence[Run], about: About = NOTHING) -> list[Report]:
    """A report for each stage; all of them name one experiment."""
    experiment = str(uuid.uuid4())
    return [report(run, number, experiment, about) for number, run in enumerate(runs)]


def report(run: Run, stage: int, experiment: str, about: About) -> Report:
    """The report of one stage (from 0)."""
    figures = Figures(run, about.since)
    return Report(
        run=_run(run, stage, experiment, about),
        scenario=Scenario(
            stack=list(about.stack) or stack_of(run.target), load=_load(run, stage, about)
        ),
        results=Results(
            request_performance=RequestPerformance(
                aggregate=aggregate(figures), time_series=series(figures)
            ),
            session_performance=_sessions(figures),
            observability=_observability(figures, about),
        ),
    )


def aggregate(figures: Figures) -> Aggregate:
    """Counts, latencies and rates of a run."""
    done = figures.done
    found = figures.latencies()
    latency = {name: statistics(found[name], units) for name, units in LATENCIES.items()}
    tokens_in, tokens_out = figures.input_tokens, figures.output_tokens
    return Aggregate(
        requests=Requests(
            total=len(figures.run.records),
            failures=len(figures.run.records) - len(done) - figures.incomplete,
            incomplete=figures.incomplete,
            input_length=statistics((each.input_tokens for each in done), "count"),
            output_length=statistics((each.output_tokens for each in done), "count"),
            request_size=statistics((each.sent_bytes or None for each in done), "bytes"),
        ),
        latency=Latency(**latency),
        throughput=Throughput(
            input_token_rate=only_mean(figures.rate(tokens_in), "tokens/s"),
            output_token_rate=only_mean(figures.rate(tokens_out), "tokens/s"),
            total_token_rate=only_mean(figures.rate(tokens_in + tokens_out), "tokens/s"),
            request_rate=only_mean(figures.rate(len(done)), "queries/s"),
        ),
    )


def _run(run: Run, stage: int, experiment: str, about: About) -> RunSection:
    end = run.started + run.duration_s
    return RunSection(
        uid=str(uuid.uuid5(uuid.UUID(experiment), str(stage))),
        eid=experiment,
        description=about.description or run.name or None,
        keywords=list(about.keywords) or None,
        time=RunTime(
            start=instant(run.started), end=instant(end), duration=f"PT{run.duration_s:.6f}S"
        ),
    )


def stack_of(target: Mapping[str, Any]) -> list[Component]:
    """Who served, as far as a client can tell; without HTTP also the policy and the device."""
    found = [engine(target)]
    if "policy" in target:
        named = {"kind": "generic", "tool": "neustream", "tool_version": version()}
        scheduler = Generic.model_validate({**named, "policy": target["policy"]})
        told = ComponentMetadata(label="scheduler", cfg_id=_digest(target["policy"]))
        found.append(Component(metadata=told, standardized=scheduler, native=Native()))
    return found


def engine(target: Mapping[str, Any]) -> Component:
    """Who served, but for the scheduler."""
    model = target.get("model") or UNKNOWN
    here = "policy" in target
    return Component(
        metadata=ComponentMetadata(label=SERVER, cfg_id=_digest(target)),
        standardized=Engine(
            kind="inference_engine",
            tool="neustream" if here else UNKNOWN,
            tool_version=version() if here else UNKNOWN,
            role="replica",
            replicas=target.get("devices", 1),
            model=Model(name=model),
            accelerator=Accelerator(
                model=target.get("device", UNKNOWN), count=int(here), parallelism=Parallelism()
            ),
        ),
        native=Native(args={"url": target.get("url", UNKNOWN)}),
    )


def _load(run: Run, stage: int, about: About) -> LoadSection:
    told = dict(run.plan.get("meta", {}).get("scenario", {}))
    done = [record for record in run.records if record.input_tokens]
    if "input_seq_len" not in told:
        mean = sum(record.input_tokens or 0 for record in done) / len(done) if done else 0.0
        told |= {"input_seq_len": {"distribution": "other", "value": mean}}
    rate, concurrency = run.plan.get("rate"), run.plan.get("concurrency")
    standardized = {
        "tool": "neustream",
        "tool_version": version(),
        "parallelism": max(1, run.client.get("processes", 1)),
        "source": UNKNOWN,
        "stage": stage,
        **told,
        "rate_qps": rate or None,
        "concurrency": concurrency,
    }
    args = {name: value for name, value in run.plan.items() if name != "meta"}
    return LoadSection(
        metadata=LoadMetadata(cfg_id=_digest(args), description=run.name or None),
        standardized=LoadStandardized.model_validate(standardized),
        native=Native(args=args | {"since": about.since}, config=dict(about.config) or None),
    )


def _sessions(figures: Figures) -> SessionPerformance | None:
    found = sessions(figures)
    return None if found is None else SessionPerformance(sessions=found)


def _observability(figures: Figures, about: About) -> Observability:
    dropped = promises.dropped(figures.run.records)
    share = dropped / len(figures.run.records) if figures.run.records else 0.0
    block = promises.block(figures, about.constraints)
    found: dict[str, Any] = {"drop_rate": only_mean(share, "fraction"), "neustream_slo": block}
    label = about.stack[0].metadata.label if about.stack else SERVER
    scraped = component(figures.run.meta.get(SCRAPED, ()), label)
    if scraped is not None:
        found["components"] = [scraped]
    return Observability.model_validate(found)


def version() -> str:
    """Of this library."""
    try:
        return importlib.metadata.version("neustream")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
