"""A plan without HTTP: an experiment's model simulated, or served in this process, under the same workload."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.bench.plan import Plan
from neustream.bench.runs import Run
from neustream.bench.watching import Watch
from neustream.commands.interrupts import Interrupts, raise_unless_pressed
from neustream.commands.printing import new_progress, note, say_notes
from neustream.commands.reach import naming
from neustream.config import Experiment, LlmExperiment, load_config
from neustream.engine.clock import epoch
from neustream.errors import ConfigError
from neustream.experiment.policies import build_policy
from neustream.experiment.prepared import prepare
from neustream.experiment.running import simulate
from neustream.workload import write_trace
from neustream.workload.asks import Ask
from neustream.workload.row import Row

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


def play_here(plan: Plan, options: TwinOptions) -> Run:
    """Play it; the first Ctrl-C ends it early, with what there is.

    Raises:
        ConfigError: the plan has no schedule, or the experiment cannot serve it.
    """
    if options.config is None:
        raise ConfigError("--backend neustream: needs --config, an experiment's YAML")
    _check(plan)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "plan.jsonl"
        write_trace(trace, [row_of(ask) for ask in plan.asks])
        config = _config(options, trace, len(plan.asks), plan.asks[0].image is not None)
        with naming(options.config):
            build_policy(config, options.policy)
            return _served(plan, config, options) if options.real else _simulated(plan, config, options)


def row_of(ask: Ask) -> Row:
    """A request as a row of a trace. Without a first token no promise of further ones can be told."""
    limits, image = ask.limits, ask.image
    first = limits.ttft_s if math.isfinite(limits.ttft_s) else limits.e2e_s
    return Row(
        arrival_s=ask.arrival_s,
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
    if any(ask.arrival_s is None for ask in plan.asks) or plan.concurrency is not None:
        raise ConfigError("--backend neustream: needs --request-rate or a trace, and no --max-concurrency")
    if any(ask.follows for ask in plan.asks):
        raise ConfigError("--backend neustream: turns that wait for each other are not served here")
    if len({ask.image is None for ask in plan.asks}) > 1:
        raise ConfigError("--backend neustream: expected texts, or images; there are both")


def _config(options: TwinOptions, trace: Path, requests: int, images: bool) -> Experiment:
    """The experiment with the plan in place of its own workload."""
    assert options.config is not None
    dropped = [f"workload.{key}=null" for key in DROPPED]
    ours = [*dropped, f"workload.trace={trace}", f"workload.requests={requests}"]
    config = load_config(options.config, [*(options.set_ or ()), *ours])
    if not isinstance(config, Experiment):
        raise ConfigError(f"{options.config}: several models; expected an experiment of one")
    if isinstance(config, LlmExperiment) == images:
        makes, asked = ("texts", "images") if images else ("images", "texts")
        raise ConfigError(f"{options.config}: its model makes {makes}, and {asked} are asked for (--dataset-name)")
    return config


def _target(options: TwinOptions, config: Experiment) -> dict[str, Any]:
    how = "neustream-service" if options.real else "neustream-simulated"
    told = {"url": str(options.config), "api": how, "backend": how, "model": config.name}
    return {**told, "policy": options.policy}


def _simulated(plan: Plan, config: Experiment, options: TwinOptions) -> Run:
    with new_progress() as progress:
        task = progress.add_task(f"simulating {plan.name}", total=len(plan.asks))
        prepared = prepare(config)
        say_notes(_told(prepared.notes))
        watch = Watch(plan, [request.id for request in prepared.requests], lambda _: progress.advance(task))
        watch.origin = -_first(plan)
        started, interrupted = epoch(), False
        try:
            simulate(prepared, options.policy, [watch])
        except KeyboardInterrupt:
            raise_unless_pressed("the policy")
            interrupted = True
        note(progress, f"simulated {plan.name}: {len(plan.asks)} requests")
    return watch.run(_target(options, config), started, interrupted=interrupted)


def _served(plan: Plan, config: Experiment, options: TwinOptions) -> Run:
    from neustream.backends.replaying import Replay
    from neustream.backends.serving import Session

    with new_progress() as progress, Interrupts() as interrupts:
        task = progress.add_task("building the model", total=len(plan.asks))
        session = Session(config, options.device)
        say_notes(_told(session.prepared.notes))
        watch = Watch(plan, [request.id for request in session.prepared.requests])
        started = epoch()

        def begun(replay: Replay) -> None:
            watch.origin = replay.start - _first(plan)
            interrupts.watch(replay)
            progress.update(task, description=f"serving {plan.name}")

        session.serve(options.policy, [watch], lambda: progress.advance(task), begun)
        note(progress, f"served {plan.name}: {len(plan.asks)} requests")
    return watch.run(_target(options, config), started, interrupted=interrupts.hit)


def _first(plan: Plan) -> float:
    """When its first request comes: a trace's own arrivals begin with 0 there."""
    return plan.asks[0].arrival_s or 0.0


def _told(notes: Sequence[str]) -> list[str]:
    """What is good to know of the plan: not which of our own columns an experiment has no use for."""
    return [each for each in notes if "not used" not in each]
