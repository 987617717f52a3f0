"""A stock pipeline behind an engine: `serve(pipe)`, then `submit(prompt=..., slo=...)`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import shutil
import sys
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from neustream.backends.diffusers.calls import Call
from neustream.backends.diffusers.journal import generators_of
from neustream.backends.diffusers.measured import ProfileCache, timed
from neustream.backends.diffusers.modules import Runs, graph_of, modules_of
from neustream.backends.diffusers.parts import Parts, models_of, parts_of, state_of
from neustream.backends.diffusers.request import (
    StepCounts,
    check,
    kind_of,
    named_arguments,
    samples_of,
    with_defaults,
    without_side_effects,
)
from neustream.backends.diffusers.run import Progress, Run, encode
from neustream.backends.options import measuring, policy_of, slo_of
from neustream.core.batch import StepInput
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
SAMPLE: Mapping[str, Any] = {"prompt": "a lighthouse in a storm", "class_labels": [0]}
"""What pipelines are measured with at the start, as far as they take it."""
RESERVED = {"slo", "id", "model", "on_step"}
"""Arguments of `submit` itself."""


class Answer(Future[Any]):
    """What `submit` returns: the pipeline's own output, once it is there.

    A `concurrent.futures.Future` that can be awaited too. `result()` raises RequestError if the request
    was dropped or failed, CancelledError if it was cancelled; `cancel()` gives the request up, at the
    latest after the step that it is in. `ended` says how it went and how long it took.
    """

    def __init__(self, id: str, give_up: Callable[[str], Any]) -> None:
        super().__init__()
        self.id = id
        self.ended: Result | None = None
        self._give_up = give_up

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled and self.ended is None:
            self._give_up(self.id)
        return cancelled

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()


@dataclass(frozen=True, eq=False)
class Shape:
    """Calls whose steps can share batches: their graph, and the rows and samples that count as one unit."""

    label: str
    graph: Graph
    rows: int
    samples: int


class Served:
    """One pipeline of an engine: its parts, its runs, and the shapes that it has been asked for."""

    def __init__(self, name: str, pipe: DiffusionPipeline, parts: Parts, profile_cache: ProfileCache) -> None:
        self.name = name
        self.pipe = pipe
        self.parts = parts
        self.profile_cache = profile_cache
        self.state = state_of(pipe)
        self.steps = StepCounts(pipe)
        self.shapes: dict[Hashable, Shape] = {}
        self.kinds: dict[Hashable, tuple[Shape, int]] = {}
        self.lock = threading.Lock()

    @property
    def roles(self) -> list[str]:
        """The stages that its requests go through: those without a decoder end with their last step."""
        roles = {part.role for methods in self.parts.values() for part in methods.values()}
        return ["encode", "denoise", *(["decode"] if "decode" in roles else [])]

    def begin(self, given: StepInput) -> Run:
        return Run(
            self.pipe,
            self.parts,
            given.params["arguments"],
            expected=given.params["steps"],
            on_step=given.params.get("on_step"),
        )

    def probe(self, arguments: Mapping[str, Any]) -> Call:
        """The first call of a denoiser that a call of the pipeline makes."""
        run = Run(self.pipe, self.parts, arguments)
        encode([run])
        call = run.parked
        if run.error is not None:
            raise run.error
        if not isinstance(call, Call):
            raise BackendError(f"{type(self.pipe).__name__} ended without a call of a denoiser")
        run.close()
        return call

    def unchanged(self) -> None:
        """RequestError if somebody moved or changed the pipeline since it was served."""
        now = state_of(self.pipe)
        for name, known in self.state.items():
            if now.get(name) == known:
                continue
            what = "replaced or removed" if name not in now or now[name][0] != known[0] else "moved or changed"
            detail = "" if name not in now else f": {known[1:]} before, {now[name][1:]} now"
            raise RequestError(
                f"{name} of {type(self.pipe).__name__} was {what} while it is served{detail}; "
                "close the engine first, then serve the pipeline again"
            )


_served: weakref.WeakValueDictionary[int, PipelineEngine] = weakref.WeakValueDictionary()
"""Which engine serves a model, by the model's id."""
_claims = threading.Lock()


class PipelineEngine:
    """Stock pipelines, served step by step by one device.

    Args:
        pipes: a pipeline, or several by name; each on the device and in the dtype that it is to run in.
        slo: what requests are promised that bring no promise of their own; a number is `SLO(total=...)`.
        profiles: latency profiles by stage, or the folder of their files (`neustream profile` writes
            one; several pipelines have a folder each in it). None: those in the user's cache; what is
            not there is measured first and kept.
        policy: an object or the name of one; default: `Priced`.
        samples: arguments of calls that are measured and warmed up at the start (other shapes: when
            they are first asked for). Default: one call with the pipeline's defaults, if it needs no
            more than a prompt or a class.
        max_batch, encode_batch, decode_batch: the most requests in one step.
        buckets: row counts that batches are padded to. A request's result then does not depend, to
            the last bit, on who shared its batches, if there is one bucket.
        compile: compile the denoisers with `torch.compile`, once per bucket; a mapping: its arguments
            (`{"mode": "reduce-overhead"}` captures CUDA graphs).
        check_finite: fail a request whose latents hold NaN or infinity in place of decoding them.
        measure_s: seconds that measuring one shape may take, about.
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
        self._generators = _Generators()
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
        rule = policy_of(policy)
        scheduler = Scheduler([Pool(POOL, ())], rule, {}, correct=True)
        self._executor = ThreadExecutor({})
        observers = [self.report, self._watch, *observers]
        self.engine = Engine(Member(scheduler, {POOL: self._executor}), WallClock(), observers)
        self._claim()
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
    ) -> Answer:
        """Ask for one call of the pipeline with its own arguments; safe from any thread.

        The stock call looks at its arguments first and raises what it has against them. A call of a
        shape that was not asked for before waits here until that is measured.

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
        answer = Answer(name, self._give_up)
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
        with _claims:
            for served in self._models.values():
                for _, model in models_of(served.pipe):
                    if _served.get(id(model)) is self:
                        del _served[id(model)]
        for served in self._models.values():
            served.pipe.maybe_free_model_hooks()

    def __enter__(self) -> PipelineEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)

    @property
    def profiles(self) -> Mapping[str, LatencyProfile]:
        """The profiles that decisions are made by now, corrections included."""
        return self.engine.members[0].scheduler.times.profiles

    # -- inside: requests -----------------------------------------------------------------------------

    def _model(self, name: str | None) -> Served:
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name is None or name not in self._models:
            raise RequestError(f"model={name!r}: {nearest(str(name), self._models)}")
        return self._models[name]

    def _answered(self, answer: Answer, done: Future[Result], named: Mapping[str, Any]) -> None:
        self._generators.free(named)
        error = done.exception()
        if error is None:
            answer.ended = done.result()
        if not answer.set_running_or_notify_cancel():
            return  # its caller cancelled it
        if error is not None:
            answer.set_exception(error)
            return
        try:
            answer.set_result(_output_of(done.result()))
        except RequestError as failed:
            answer.set_exception(failed)

    def _give_up(self, name: str) -> None:
        with contextlib.suppress(RequestError):  # the engine is closed: it is over anyway
            self.engine.cancel(name)

    # -- inside: shapes -------------------------------------------------------------------------------

    def _shape(self, served: Served, named: Mapping[str, Any], whole: Mapping[str, Any]) -> tuple[Shape, int]:
        """The shape of a call and its rows; what is new is looked at, and measured, on the device's thread."""
        kind = kind_of(whole)
        if kind not in served.kinds:
            with served.lock:
                if kind not in served.kinds:
                    call = self._executor.call(lambda: served.probe(without_side_effects(named))).result()
                    if call.shape not in served.shapes:
                        served.shapes[call.shape] = self._open(served, call, named, whole)
                    served.kinds[kind] = served.shapes[call.shape], call.rows
        return served.kinds[kind]

    def _open(self, served: Served, call: Call, named: Mapping[str, Any], whole: Mapping[str, Any]) -> Shape:
        """Serve calls of a new shape: its graph, modules and profiles."""
        rows, samples = call.rows, samples_of(whole)
        label = "x".join(map(str, call.shape[0]))
        prefix = f"{served.name}/" if served.name else ""
        names = {role: f"{prefix}{role}@{label}" for role in served.roles}
        files = {stage: f"{role}@{label}" for role, stage in names.items()}

        def graph() -> Graph:
            sizes: dict[str, Callable[[Job], float]] = {
                "encode": partial(_share, "samples", samples),
                "denoise": partial(_share, "rows", rows),
                "decode": partial(_share, "samples", samples),
            }
            stages = {role: Stage(names[role], max_batch=self._batches[role], size=sizes[role]) for role in names}
            return graph_of(prefix + label, stages)

        profiles = served.profile_cache.find(files)

        def sample(steps: int) -> dict[str, Any]:
            arguments = without_side_effects(named)
            if arguments.get("output_type") == "latent":
                del arguments["output_type"]  # others will want theirs decoded
            if "num_inference_steps" in whole:
                arguments["num_inference_steps"] = steps
            return {"arguments": arguments, "steps": steps, "rows": rows, "samples": samples}

        trial = Runs(served.begin)
        work = partial(self._try, trial, graph(), names, sample, served, warm=profiles is not None)
        measured = self._executor.call(work).result()
        if profiles is None:
            served.profile_cache.keep(measured, files)
            profiles = served.profile_cache.find(files)
            assert profiles is not None
        runs = Runs(served.begin, check_finite=self._check_finite)
        shape = Shape(label, graph(), rows, samples)
        self._executor.add(modules_of(runs, names))
        self.engine.add(POOL, profiles).result()
        return shape

    def _try(
        self,
        runs: Runs,
        graph: Graph,
        names: Mapping[str, str],
        sample: Callable[[int], Mapping[str, Any]],
        served: Served,
        *,
        warm: bool,
    ) -> dict[str, list[Measurement]]:
        """Run the stages of a new shape: to measure them, or only to have everything loaded and compiled."""
        show = sys.stderr.isatty() if self._progress is None else self._progress
        what = f"{'warming up' if warm else 'measuring'} {type(served.pipe).__name__} {graph.name}"
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
                self._shape(served, named, with_defaults(served.pipe, named))

    # -- inside: the engine ---------------------------------------------------------------------------

    def _claim(self) -> None:
        with _claims:
            for served in self._models.values():
                for name, model in models_of(served.pipe):
                    if _served.get(id(model), self) is not self:
                        self._executor.close()
                        raise BackendError(
                            f"{name} of {type(served.pipe).__name__} is served by another engine: close that first"
                        )
            for served in self._models.values():
                for _, model in models_of(served.pipe):
                    _served[id(model)] = self

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


class _Generators:
    """Which request each torch.Generator draws for: one at a time, or results would depend on their order."""

    def __init__(self) -> None:
        self._users: dict[int, str] = {}
        self._lock = threading.Lock()

    def take(self, named: Mapping[str, Any], request: str) -> None:
        mine = [id(generator) for generator in generators_of(named)]
        with self._lock:
            for generator in mine:
                if generator in self._users:
                    raise RequestError(
                        f"the generator of request {request!r} is in use by request {self._users[generator]!r}: "
                        "give each request its own"
                    )
            self._users.update(dict.fromkeys(mine, request))

    def free(self, named: Mapping[str, Any]) -> None:
        with self._lock:
            for generator in generators_of(named):
                self._users.pop(id(generator), None)


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


def default_sample(served: Served) -> dict[str, Any] | None:
    """A call with the pipeline's defaults; None if it needs more than a prompt or a class."""
    pipe = served.pipe
    parameters = inspect.signature(pipe.__call__).parameters.values()
    sample = {p.name: SAMPLE[p.name] for p in parameters if p.name in SAMPLE}
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
    ]
    if not sample or set(needed) - set(sample) or any(p.name == "image" for p in parameters):
        return None
    try:
        check(pipe, sample, served.parts.device)
    except Exception:  # it wants other arguments: the first request brings them
        return None
    return sample


def _output_of(result: Result) -> Any:
    """What the pipeline returned; RequestError if the request has none, and why."""
    output = result.unwrap()
    if "output" not in output:
        raise RequestError(f"request {result.id!r}: the pipeline's call did not end with its last stage")
    return output["output"]


def _share(of: str, usual: int, job: Job) -> float:
    """How many times as many samples or rows as usual a request has: the size of its steps."""
    count: int = job.params[of]
    return count / usual


def _servable(name: str, pipe: Any) -> None:
    if not isinstance(pipe, DiffusionPipeline):
        what = f"{name!r}: " if name else ""
        raise BackendError(
            f"{what}serve takes a diffusers DiffusionPipeline (or several by name), got {type(pipe).__name__}"
        )
    if taken := RESERVED & set(inspect.signature(pipe.__call__).parameters):
        raise BackendError(f"{type(pipe).__name__} has call argument(s) {sorted(taken)}, which submit() takes itself")
