"""A stock pipeline behind an engine: `serve(pipe)`, then `submit(prompt=..., slo=...)`."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from neustream.backends.answer import Answer
from neustream.backends.diffusers.calls import Call
from neustream.backends.diffusers.claims import claim, free
from neustream.backends.diffusers.measured import ProfileCache, timed
from neustream.backends.diffusers.modules import Runs, graph_of, modules_of
from neustream.backends.diffusers.parts import parts_of
from neustream.backends.diffusers.request import (
    check,
    kind_of,
    named_arguments,
    samples_of,
    with_defaults,
    without_side_effects,
)
from neustream.backends.diffusers.run import Progress
from neustream.backends.diffusers.served import (
    Generators,
    Served,
    Shape,
    default_sample,
    label_of,
    output_of,
    predicted,
    share_of,
)
from neustream.backends.options import measuring, slo_of
from neustream.by_name import make_policy
from neustream.core.events import Corrected
from neustream.core.graph import Graph, Stage
from neustream.core.job import Job
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.types import SLO
from neustream.engine.answers import Result
from neustream.engine.clock import WallClock
from neustream.engine.engine import Engine
from neustream.engine.events import Observer, Record
from neustream.engine.executor import ThreadExecutor
from neustream.engine.member import Member
from neustream.engine.report import Report
from neustream.errors import BackendError, RequestError, nearest
from neustream.profiling.files import Measurement

log = logging.getLogger("neustream")

POOL = "device"
OFF = 0.2
"""A profile that is off by more than this share is warned about, once a stage."""
RESERVED = {"slo", "id", "model", "on_step"}
"""Arguments of `submit` itself."""


class PipelineEngine:
    """Stock pipelines, served step by step by one device.

    Args:
        pipes: a pipeline, or several by name; each on the device and in the dtype that it is to run in.
        slo: what requests are promised that bring no promise of their own; a number is `SLO(total=...)`.
        profiles: latency profiles by stage, or the folder of their files (`neustream profile` writes
            one; several pipelines have a folder each in it). None: those in the user's cache; what is
            not there is measured first and kept.
        policy: an object or the name of one; default: `Priced`.
        samples: arguments of calls that are measured and warmed up at the start. Profiles of other
            shapes are predicted from those of the nearest one, when they are first asked for, and
            corrected while they are served; `neustream profile --size` measures them. Default: one
            call with the pipeline's defaults, if it needs no more than a prompt or a class.
        max_batch, encode_batch, decode_batch: the most requests in one step.
        buckets: row counts that batches are padded to. A request's result then does not depend, to
            the last bit, on who shared its batches, if there is one bucket.
        compile: compile the denoisers with `torch.compile`, once per bucket; a mapping: its arguments
            (`{"mode": "reduce-overhead"}` captures CUDA graphs).
        check_finite: fail a request whose latents hold NaN or infinity in place of decoding them.
        measure_s: seconds that measuring a sample may take, about.
        cache: the folder of the cache; default: the user's.
        observers: told of every Record.
        progress: show what is measured; default: if stderr is a terminal.

    Raises:
        BackendError: the pipeline cannot be served, or another engine serves it.
    """

    def __init__(
        self,
        pipes: DiffusionPipeline | Mapping[str, DiffusionPipeline],
        *,
        slo: SLO | float | None = None,
        profiles: Mapping[str, LatencyProfile] | Path | str | None = None,
        policy: Policy | str | None = None,
        samples: Sequence[Mapping[str, Any]] | None = None,
        max_batch: int = 16,
        encode_batch: int = 16,
        decode_batch: int = 8,
        buckets: Sequence[int] = (),
        compile: bool | Mapping[str, Any] = False,
        check_finite: bool = True,
        measure_s: float = 60.0,
        cache: Path | str | None = None,
        observers: Sequence[Observer] = (),
        progress: bool | None = None,
    ) -> None:
        self.slo = slo_of(slo)
        self._batches = {"encode": encode_batch, "denoise": max_batch, "decode": decode_batch}
        self._check_finite = check_finite
        self._measure_s = measure_s
        self._progress = progress
        self._generators = Generators()
        self._warned: set[str] = set()
        options = {"buckets": tuple(buckets), "compile": compile}
        named = dict(pipes) if isinstance(pipes, Mapping) else {"": pipes}
        self._models = {}
        for name, pipe in named.items():
            _servable(name, pipe)
            parts = parts_of(pipe, buckets=buckets, compile=compile)
            given = Path(profiles) / name if isinstance(profiles, str | Path) else profiles
            profile_cache = ProfileCache(pipe, given, {**options, **self._batches}, cache)
            self._models[name] = Served(name, pipe, parts, profile_cache)
        self.report = Report()
        rule = make_policy(policy)
        scheduler = Scheduler([Pool(POOL, ())], rule, {}, correct=True)
        self._executor = ThreadExecutor({})
        observers = [self.report, self._watch, *observers]
        self.engine = Engine(Member(scheduler, {POOL: self._executor}), WallClock(), observers)
        try:
            claim(self, self._pipes)
        except BackendError:
            self._executor.close()
            raise
        self.engine.start()
        try:
            self._prepare(samples)
        except BaseException:
            self.close(cancel=True)
            raise

    # -- requests -------------------------------------------------------------------------------------

    def submit(
        self,
        *args: Any,
        slo: SLO | float | None = None,
        id: str | None = None,
        model: str | None = None,
        on_step: Callable[[Progress], None] | None = None,
        **kwargs: Any,
    ) -> Answer[Any]:
        """Ask for one call of the pipeline with its own arguments; safe from any thread.

        The stock call looks at its arguments first and raises what it has against them. A call of a
        shape that was not asked for before is looked at on the device first, up to its first
        denoising step; its latencies are predicted from those of known shapes. The very first one
        waits until it is measured, if no `samples` were.

        Args:
            slo: what it is promised; a number is `SLO(total=...)`. Default: the engine's.
            id: its name, default: a random one.
            model: which pipeline, if there are several.
            on_step: told of each denoising step, with the latents, on the device's thread.
        """
        self.engine.ready()
        served = self._model(model)
        named = named_arguments(served.pipe, args, kwargs)
        served.unchanged()
        check(served.pipe, named, served.parts.device)
        name = id or uuid.uuid4().hex
        whole = with_defaults(served.pipe, named)
        shape, rows = self._shape(served, named, whole)
        params = {
            "arguments": named,
            "steps": served.steps.of(whole),
            "rows": rows,
            "samples": samples_of(whole),
            "on_step": on_step,
        }
        answer = Answer[Any](name, self._give_up)
        promise = self.slo if slo is None else slo_of(slo)
        self._generators.take(named, name)
        try:
            inner = self.engine.submit(shape.graph, params, slo=promise, id=name)
        except BaseException:
            self._generators.free(named)
            raise
        inner.add_done_callback(lambda done: self._answered(answer, done, named))
        return answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask and wait: as the pipeline's own call."""
        return self.submit(*args, **kwargs).result()

    def close(self, *, cancel: bool = False) -> None:
        """Serve what is open (or cancel it), then stop; the pipeline is the caller's again."""
        self.engine.close(cancel=cancel)
        free(self, self._pipes)
        for pipe in self._pipes:
            pipe.maybe_free_model_hooks()

    def __enter__(self) -> PipelineEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)

    @property
    def profiles(self) -> Mapping[str, LatencyProfile]:
        """The profiles that decisions are made by now, corrections included."""
        return self.engine.members[0].scheduler.times.profiles

    @property
    def _pipes(self) -> list[DiffusionPipeline]:
        return [served.pipe for served in self._models.values()]

    # -- inside: requests -----------------------------------------------------------------------------

    def _model(self, name: str | None) -> Served:
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name is None or name not in self._models:
            raise RequestError(f"model={name!r}: {nearest(str(name), self._models)}")
        return self._models[name]

    def _answered(self, answer: Answer[Any], done: Future[Result], named: Mapping[str, Any]) -> None:
        self._generators.free(named)
        answer.settle(done, output_of)

    def _give_up(self, name: str) -> None:
        with contextlib.suppress(RequestError):  # the engine is closed: it is over anyway
            self.engine.cancel(name)

    # -- inside: shapes -------------------------------------------------------------------------------

    def _shape(
        self, served: Served, named: Mapping[str, Any], whole: Mapping[str, Any], *, first: bool = False
    ) -> tuple[Shape, int]:
        """The shape of a call and its rows; what is new is looked at on the device's thread.

        `first`: before anybody is served, so that it can be measured.
        """
        kind = kind_of(whole)
        if kind not in served.kinds:
            with served.lock:
                if kind not in served.kinds:
                    call = self._executor.call(lambda: served.probe(without_side_effects(named))).result()
                    if call.shape not in served.shapes:
                        served.shapes[call.shape] = self._open(served, call, named, whole, first)
                    served.kinds[kind] = served.shapes[call.shape], call.rows
        return served.kinds[kind]

    def _open(
        self, served: Served, call: Call, named: Mapping[str, Any], whole: Mapping[str, Any], first: bool
    ) -> Shape:
        """Serve calls of a new shape: its graph, modules and profiles."""
        samples = samples_of(whole)
        label = label_of(call)
        prefix = f"{served.name}/" if served.name else ""
        names = {role: f"{prefix}{role}@{label}" for role in served.roles}
        graph = partial(self._graph, prefix + label, names, call.rows, samples)
        profiles = self._profiles(served, call, names, graph, named, whole, first)
        runs = Runs(served.begin, check_finite=self._check_finite)
        self._executor.add(modules_of(runs, names))
        self.engine.add(POOL, {names[role]: profile for role, profile in profiles.items()}).result()
        return Shape(label, graph(), call.rows, samples, math.prod(call.shape[0]), profiles)

    def _graph(self, name: str, names: Mapping[str, str], rows: int, samples: int) -> Graph:
        """What requests of a shape go through, with `rows` and `samples` counting as one."""
        sizes: dict[str, Callable[[Job], float]] = {
            "encode": partial(share_of, "samples", samples),
            "denoise": partial(share_of, "rows", rows),
            "decode": partial(share_of, "samples", samples),
        }
        stages = {role: Stage(names[role], max_batch=self._batches[role], size=sizes[role]) for role in names}
        return graph_of(name, stages)

    def _profiles(
        self,
        served: Served,
        call: Call,
        names: Mapping[str, str],
        graph: Callable[[], Graph],
        named: Mapping[str, Any],
        whole: Mapping[str, Any],
        first: bool,
    ) -> Mapping[str, LatencyProfile]:
        """Profiles of a new shape by role: given, kept, predicted from those of a known one, or measured.

        What comes first, and the first shape of all, is tried on the device: measured, or only to have
        everything loaded.
        """
        files = {stage: f"{role}@{label_of(call)}" for role, stage in names.items()}
        found = served.profile_cache.find(files)
        near = None if first else served.nearest(call)
        if found is None and near is not None:
            log.info("%s %s: profiles predicted from those of %s", type(served.pipe).__name__, graph().name, near.label)
            return predicted(near, call, samples_of(whole))
        if near is None:
            work = partial(self._try, graph(), names, served, call, named, whole, warm=found is not None)
            measured = self._executor.call(work).result()
            if found is None:
                served.profile_cache.keep(measured, files)
                found = served.profile_cache.find(files)
        assert found is not None
        return {role: found[stage] for role, stage in names.items()}

    def _try(
        self,
        graph: Graph,
        names: Mapping[str, str],
        served: Served,
        call: Call,
        named: Mapping[str, Any],
        whole: Mapping[str, Any],
        *,
        warm: bool,
    ) -> dict[str, list[Measurement]]:
        """Run the stages of a shape: to measure them, or only to have everything loaded and compiled."""

        def sample(steps: int) -> dict[str, Any]:
            arguments = without_side_effects(named)
            if arguments.get("output_type") == "latent":
                del arguments["output_type"]  # others will want theirs decoded
            if "num_inference_steps" in whole:
                arguments["num_inference_steps"] = steps
            return {"arguments": arguments, "steps": steps, "rows": call.rows, "samples": samples_of(whole)}

        show = sys.stderr.isatty() if self._progress is None else self._progress
        what = f"{'warming up' if warm else 'measuring'} {type(served.pipe).__name__} {graph.name}"
        runs = Runs(served.begin)
        with measuring(what, show) as tick:
            try:
                modules = modules_of(runs, names)
                seconds = 0.0 if warm else self._measure_s
                return timed(graph, modules, sample, served.parts.device, seconds=seconds, tick=tick)
            finally:
                runs.close()

    def _prepare(self, samples: Sequence[Mapping[str, Any]] | None) -> None:
        for served in self._models.values():
            for sample in [default_sample(served)] if samples is None else samples:
                if sample is None:
                    continue
                named = named_arguments(served.pipe, (), sample)
                try:
                    check(served.pipe, named, served.parts.device)
                except Exception as error:  # whatever the pipeline has against it
                    raise BackendError(f"samples: {dict(sample)}: {error}") from error
                self._shape(served, named, with_defaults(served.pipe, named), first=True)

    # -- inside: the engine ---------------------------------------------------------------------------

    def _watch(self, record: Record) -> None:
        if not isinstance(record, Corrected) or record.stage in self._warned:
            return
        off = max(record.factors.values(), key=lambda factor: abs(factor - 1))
        if abs(off - 1) > OFF:
            self._warned.add(record.stage)
            log.warning(
                "steps of %r take %.2f times what its profile says: corrected from now on; "
                "measure it again with `neustream profile`, or delete it from the cache",
                record.stage,
                off,
            )


def profile(pipe: DiffusionPipeline, calls: Sequence[Mapping[str, Any]], out: Path | str, **options: Any) -> list[Path]:
    """Measure the stages of `calls` of a pipeline, one for each shape; `serve(pipe, profiles=out)` finds the files.

    `options` are those of `PipelineEngine`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        PipelineEngine(pipe, samples=calls, cache=Path(folder), **options).close()
        files = sorted(Path(folder).rglob("*.json"))
        return [Path(shutil.copy(file, out / file.name)) for file in files]


def _servable(name: str, pipe: Any) -> None:
    if not isinstance(pipe, DiffusionPipeline):
        what = f"{name!r}: " if name else ""
        raise BackendError(
            f"{what}serve takes a diffusers DiffusionPipeline (or several by name), got {type(pipe).__name__}"
        )
    if taken := RESERVED & set(inspect.signature(pipe.__call__).parameters):
        raise BackendError(f"{type(pipe).__name__} has call argument(s) {sorted(taken)}, which submit() takes itself")
