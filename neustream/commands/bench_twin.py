"""A plan without HTTP: an experiment's model simulated, or served in this process, under the same workload."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.bench.plan import Plan
from neustream.bench.runs import Run
from neustream.bench.watching import Watch
from neustream.commands.bench_bound import bound_in, checked
from neustream.commands.interrupts import Interrupts, raise_unless_pressed
from neustream.commands.printing import new_progress, note, say_notes
from neustream.commands.reach import naming
from neustream.config import Experiment, LlmExperiment, ModelsConfig, load_config
from neustream.core.types import Request
from neustream.engine.clock import epoch
from neustream.engine.turns import Turn
from neustream.errors import ConfigError, nearest
from neustream.experiment.policies import build_policy
from neustream.experiment.prepared import Prepared, prepare
from neustream.experiment.running import simulate
from neustream.workload import write_trace
from neustream.workload.asks import Ask
from neustream.workload.row import Row

Asked = Mapping[str, Sequence[Ask]]
"""What each model of a config is asked, by its name."""
DROPPED = (
    "rate",
    "load",
    "cv",
    "burst",
    "format",
    "start_s",
    "duration_s",
    "speed",
    "columns",
    "tokenizer",
    "arrivals",
)
"""Keys of an experiment's workload that do not go with a trace, or change one."""


@dataclass(frozen=True)
class TwinOptions:
    """What serves in place of a server over HTTP, with --backend neustream."""

    config: Annotated[Path | None, typer.Option(help="An experiment's YAML: its model, profiles and SLO.")] = None
    policy: Annotated[str, typer.Option("--policy", "-p", help="That decides.")] = "default"
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key.")] = None
    real: Annotated[bool, typer.Option("--real", help="Serve the model in this process; else it is simulated.")] = False
    device: Annotated[str, typer.Option(help="Where --real serves it.")] = "cpu"
    bound: Annotated[
        bool, typer.Option("--bound", help="Also the most that --config's profiles let any scheduler serve on time.")
    ] = False


def play_here(plan: Plan, options: TwinOptions, model: str = "") -> Run:
    """Play it; the first Ctrl-C ends it early, with what there is.

    Args:
        model: which of several models is asked, by requests that name none; "": the first of their kind.

    Raises:
        ConfigError: the plan cannot be played here, or the experiment cannot serve it.
    """
    if options.config is None:
        raise ConfigError("--backend neustream: needs --config, an experiment's YAML")
    _check(plan)
    with tempfile.TemporaryDirectory() as folder:
        config, asked = _config(options, plan, model, Path(folder))
        with naming(options.config):
            for experiment in _models_in(config).values():
                build_policy(experiment, options.policy)
            play = _served if options.real else _simulated
            return play(plan, config, asked, options)


def bound_here(plan: Plan, options: TwinOptions, model: str = "") -> Mapping[str, Any]:
    """The most of a plan's requests that could be on time; `model` as `play_here` has it.

    Raises:
        ConfigError: there is no bound for such a plan or experiment.
    """
    path = checked(plan, options.config)
    _check(plan)
    with tempfile.TemporaryDirectory() as folder:
        config, asked = _config(options, plan, model, Path(folder))
        prepared, ids = _aligned(prepare(config), plan, asked)
    named = {request.id: request for request in prepared.requests}
    return bound_in(prepared, [named[id] for id in ids], plan, path)


def row_of(ask: Ask) -> Row:
    """A request as a row of a trace. Without a first token no promise of further ones can be told."""
    limits, image = ask.limits, ask.image
    first = limits.ttft_s if math.isfinite(limits.ttft_s) else limits.e2e_s
    return Row(
        arrival_s=_due(ask),
        steps=None if image is None else image.steps,
        width=None if image is None else image.width,
        height=None if image is None else image.height,
        frames=None if image is None else image.frames,
        prompt_tokens=ask.input_tokens if image is None else None,
        output_tokens=ask.ends_after or ask.output_tokens,
        max_tokens=ask.output_tokens,
        slo_s=_finite(limits.e2e_s),
        slo_ttft_s=_finite(first) if math.isfinite(limits.tpot_s) else _finite(limits.ttft_s),
        slo_tpot_s=_finite(limits.tpot_s),
    )


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _check(plan: Plan) -> None:
    if not plan.asks:
        raise ConfigError(f"plan {plan.name!r}: no requests; expected at least one")
    if plan.duration_s is not None:
        raise ConfigError(f"plan {plan.name!r}: duration_s is {plan.duration_s:g}; all requests are played here")
    if plan.concurrency is not None and plan.concurrency < 1:
        raise ConfigError(f"plan {plan.name!r}: concurrency is {plan.concurrency}; expected at least 1")
    without = [ask.id for ask in plan.asks if ask.arrival_s is None]
    if 0 < len(without) < len(plan.asks):
        raise ConfigError(f"plan {plan.name!r}: {without[0]!r} has no arrival; expected one of all, or of none")
    came: dict[str, str] = {}
    for ask in plan.asks:
        what = f"plan {plan.name!r}: {ask.id!r}"
        if ask.id in came:
            raise ConfigError(f"{what} is the id of two requests; expected different ones")
        if ask.follows and not came.get(ask.follows):
            raise ConfigError(f"{what} follows {ask.follows!r}; expected a request of a session that comes before it")
        if not 0 <= ask.think_s < math.inf:
            raise ConfigError(f"{what} has think_s {ask.think_s}; expected seconds, at least 0")
        came[ask.id] = ask.session


def _config(options: TwinOptions, plan: Plan, model: str, folder: Path) -> tuple[Experiment | ModelsConfig, Asked]:
    """The experiment with the plan in place of its own workload, and what its models are asked."""
    assert options.config is not None
    given = list(options.set_ or ())
    models = _models_in(load_config(options.config, given))
    asked = _shared_out(plan, models, model, options.config)
    for name, asks in asked.items():
        if not asks:
            continue
        trace = folder / f"{name or 'plan'}.jsonl"
        write_trace(trace, [row_of(ask) for ask in sorted(asks, key=_due)])
        where = f"models.{name}.workload" if name else "workload"
        given += [f"{where}.{key}=null" for key in DROPPED]
        given += [f"{where}.trace={trace}", f"{where}.requests={len(asks)}"]
    return load_config(options.config, given), asked


def _models_in(config: Experiment | ModelsConfig) -> Mapping[str, Experiment]:
    """By name, which is "" where there is one."""
    return config.experiments() if isinstance(config, ModelsConfig) else {"": config}


def _shared_out(plan: Plan, models: Mapping[str, Experiment], model: str, path: Path) -> Asked:
    """Which requests each model is asked, none of some.

    An experiment of one model has the name "", whatever the requests name.
    """
    asked: dict[str, list[Ask]] = {name: [] for name in models}
    for ask in plan.asks:
        asked[_model_of(ask, models, model, path)].append(ask)
    return asked


def _model_of(ask: Ask, models: Mapping[str, Experiment], model: str, path: Path) -> str:
    kind = "texts" if ask.image is None else "images"
    makes = {name: "texts" if isinstance(one, LlmExperiment) else "images" for name, one in models.items()}
    wanted = "" if "" in models else ask.model or model
    if wanted and wanted not in models:
        raise ConfigError(f"{path}: no model {wanted!r}; {nearest(wanted, models)}")
    name = wanted or next((name for name in models if makes[name] == kind), next(iter(models)))
    if makes[name] != kind:
        which = f"its model {name!r}" if name else "its model"
        raise ConfigError(f"{path}: {which} makes {makes[name]}, and {kind} are asked for (--dataset-name)")
    return name


def _aligned(prepared: Prepared, plan: Plan, asked: Asked) -> tuple[Prepared, list[str]]:
    """The requests at the plan's instants, from its first; and the id of the request of each ask.

    A trace's arrivals count from its own first one, and each model has a trace of its own. The requests of a
    model that nobody asks are those of its config, and left out.
    """
    first = _first(plan)
    found: dict[str, Request] = {}
    for pipeline, asks in zip(prepared.pipelines, asked.values(), strict=True):
        own = [request for request in prepared.requests if request.graph is pipeline.graph] if asks else []
        for request, ask in zip(own, sorted(asks, key=_due), strict=True):
            found[ask.id] = replace(request, arrival=_due(ask) - first)
    for ask in plan.asks:
        if ask.follows:  # it cannot come before that one
            arrival = max(found[ask.id].arrival, found[ask.follows].arrival)
            found[ask.id] = replace(found[ask.id], arrival=arrival)
    requests = [found[ask.id] for ask in plan.asks]
    ids = [request.id for request in requests]
    turns = {found[ask.id].id: Turn(found[ask.follows].id, ask.think_s) for ask in plan.asks if ask.follows}
    return replace(
        prepared,
        requests=sorted(requests, key=attrgetter("arrival")),
        turns=turns,
        at_once=plan.concurrency,
        scheduled=plan.scheduled,
    ), ids


def _due(ask: Ask) -> float:
    return ask.arrival_s or 0.0


def _target(options: TwinOptions, config: Experiment | ModelsConfig, prepared: Prepared) -> dict[str, Any]:
    how = "neustream-service" if options.real else "neustream-simulated"
    told = {"url": str(options.config), "api": how, "backend": how, "model": config.name}
    profiled = ", ".join(sorted({profile.device for profile in prepared.profiles.values()}))
    device = options.device if options.real else profiled or "unknown"
    return {**told, "policy": options.policy, "device": device, "devices": prepared.instances}


def _simulated(plan: Plan, config: Experiment | ModelsConfig, asked: Asked, options: TwinOptions) -> Run:
    with new_progress() as progress:
        task = progress.add_task(f"simulating {plan.name}", total=len(plan.asks))
        prepared, ids = _aligned(prepare(config), plan, asked)
        say_notes(_told(prepared.notes))
        watch = Watch(plan, ids, lambda _: progress.advance(task))
        watch.origin = -_first(plan)
        started, interrupted = epoch(), False
        try:
            simulate(prepared, options.policy, [watch])
        except KeyboardInterrupt:
            raise_unless_pressed("the policy")
            interrupted = True
        note(progress, f"simulated {plan.name}: {len(plan.asks)} requests")
    return watch.run(_target(options, config, prepared), started, interrupted=interrupted)


def _served(plan: Plan, config: Experiment | ModelsConfig, asked: Asked, options: TwinOptions) -> Run:
    from neustream.backends.replaying import Replay
    from neustream.backends.serving import Session

    with new_progress() as progress, Interrupts() as interrupts:
        task = progress.add_task("building the model", total=len(plan.asks))
        session = Session(config, options.device)
        session.prepared, ids = _aligned(session.prepared, plan, asked)
        say_notes(_told(session.prepared.notes))
        watch = Watch(plan, ids)
        started = epoch()

        def begun(replay: Replay) -> None:
            watch.origin = replay.start - _first(plan)
            interrupts.watch(replay)
            progress.update(task, description=f"serving {plan.name}")

        session.serve(options.policy, [watch], lambda: progress.advance(task), begun)
        note(progress, f"served {plan.name}: {len(plan.asks)} requests")
    return watch.run(_target(options, config, session.prepared), started, interrupted=interrupts.hit)


def _first(plan: Plan) -> float:
    """When its first request comes, which is the start of what is simulated or served."""
    return min(_due(ask) for ask in plan.asks)


def _told(notes: Sequence[str]) -> list[str]:
    """What is good to know of the plan: not which of our own columns an experiment has no use for."""
    return [each for each in notes if "not used" not in each]
