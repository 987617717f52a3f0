"""A stock pipeline, ready to be scheduled."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from neustream.backends.claims import claim, free
from neustream.backends.diffusers.arguments import check_callable
from neustream.backends.diffusers.calls import Part, Role
from neustream.backends.diffusers.dry_run import check
from neustream.backends.diffusers.extent import MOST_PIXELS
from neustream.backends.diffusers.generators import Generators
from neustream.backends.diffusers.measured import Doubts, ProfileCache
from neustream.backends.diffusers.partly import check_loaded
from neustream.backends.diffusers.parts import execution_device, models_of, parts_of
from neustream.backends.diffusers.places import Places
from neustream.backends.diffusers.preview_stages import PreviewStages
from neustream.backends.diffusers.previews import Preview
from neustream.backends.diffusers.rehearsals import Rehearsals
from neustream.backends.diffusers.replica import (
    Dimensions,
    Replica,
    default_sample,
)
from neustream.backends.diffusers.request import (
    StepCounts,
    StockCall,
    kind_of,
    named_arguments,
    samples_of,
    shortened,
    without_side_effects,
)
from neustream.backends.diffusers.run import Progress
from neustream.backends.diffusers.shapes import Shape, Shapes
from neustream.backends.diffusers.signatures import signature_of
from neustream.backends.diffusers.stepping import stepped_of
from neustream.backends.values import check_option, number, whole
from neustream.core.events import Emitted
from neustream.core.graph import Graph, Stage
from neustream.core.kv_cache import KVCache
from neustream.core.profile import LatencyProfile
from neustream.engine.answers import Result
from neustream.engine.events import Observer
from neustream.errors import BackendError, RequestError, RequestFailed, shown
from neustream.profiling.files import Measurement
from neustream.service.mount import Call, Device, Host, Instance, Probe

log = logging.getLogger("neustream")

RESERVED = {"slo", "id", "model", "on_step"}
"""Arguments of `submit` itself."""


class PipelineMount:
    """A stock pipeline, served step by step.

    Args:
        pipe: in the dtype that it is to run in.
        profiles: latency profiles by stage, by what stages do ("encode", "denoise", "decode",
            whatever the shape), or the folder of their files (`neustream profile` writes one).
            None: those in the user's cache; what is not there is measured or learnt, and kept.
        samples: arguments of calls that are measured and warmed up at the start. Default: one call
            with the pipeline's defaults, if it needs no more than a prompt or a class. Latencies of
            other shapes are predicted from those of the nearest one, corrected while they are
            served, and measured while the device idles.
        max_batch, encode_batch, decode_batch: the most requests in one step.
        max_shapes: shapes that are kept; the least recently used are forgotten.
        max_pixels: pixels of one call, at most, of all its samples and frames: a larger one would hold
            the device for minutes or take all of its memory. The default is 129 frames of 1280 x 720.
        buckets: row counts that batches are padded to. A request's result then does not depend, to
            the last bit, on who shared its batches, if there is one bucket.
        compile: compile the denoisers with `torch.compile`, once per bucket; a mapping: its
            arguments (`{"mode": "reduce-overhead"}` captures CUDA graphs).
        graphs: replay calls of the denoisers as CUDA graphs, with the same results. None: where that is
            possible; True: BackendError where it is not.
        check_finite: fail a request whose latents hold NaN or infinity in place of decoding them.
        measure_s: seconds that measuring a sample may take, about; 0: nothing is measured while
            the device idles either.
        cache: the folder of the cache; default: the user's.
        progress: show what is measured at the start; default: if stderr is a terminal.
    """

    kv_caches: Mapping[str, KVCache] = {}
    step_tokens: int | None = None

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        profiles: Mapping[str, LatencyProfile] | Path | str | None = None,
        samples: Sequence[Mapping[str, Any]] | None = None,
        max_batch: int = 16,
        encode_batch: int = 16,
        decode_batch: int = 8,
        max_shapes: int = 32,
        max_pixels: int = MOST_PIXELS,
        buckets: Sequence[int] = (),
        compile: bool | Mapping[str, Any] = False,
        graphs: bool | None = None,
        check_finite: bool = True,
        measure_s: float = 60.0,
        cache: Path | str | None = None,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(pipe, DiffusionPipeline):
            raise BackendError(f"a pipeline is a diffusers DiffusionPipeline, got {shown(pipe)}")
        _check_options(profiles, samples, buckets, compile, graphs, check_finite, cache, progress)
        self.pipe = pipe
        self._profiles = profiles
        self._samples = samples
        self._batches = {
            "encode": whole("encode_batch", encode_batch, 1, error=BackendError),
            "denoise": whole("max_batch", max_batch, 1, error=BackendError),
            "decode": whole("decode_batch", decode_batch, 1, error=BackendError),
        }
        self._max_shapes = whole("max_shapes", max_shapes, 1, error=BackendError)
        self._max_pixels = whole("max_pixels", max_pixels, 1, error=BackendError)
        self._how: dict[str, Any] = {"buckets": tuple(buckets), "compile": compile, "graphs": graphs}
        self._check_finite = check_finite
        self._measure_s = number("measure_s", measure_s, "seconds, 0 or more", lambda x: x >= 0, BackendError)
        self._cache = cache
        self._show = sys.stderr.isatty() if progress is None else progress
        self._generators = Generators()
        self._lock = threading.RLock()
        self._serves = False
        self.observers: Sequence[Observer] = ()

    @property
    def device(self) -> str:
        return str(execution_device(self.pipe))

    def check(self, name: str) -> None:
        if self._serves and not self.make_way():
            raise BackendError("this mount is served already: close that service first")
        if taken := RESERVED & signature_of(self.pipe).names:
            raise BackendError(
                f"{type(self.pipe).__name__} has call argument(s) {sorted(taken)}, which submit() takes itself"
            )
        parts_of(self.pipe, buckets=self._how["buckets"], graphs=self._how["graphs"])  # says what it cannot serve

    def parts(self, role: Role) -> list[Part]:
        """What is called for steps of a role, on all devices; once it is opened."""
        known = [replica.parts for replica in self._places.replicas]
        parts = [part for one in known for methods in one.values() for part in methods.values()]
        return [part for part in parts if part.role == role]

    @property
    def graphs(self) -> Sequence[Graph]:
        """What requests of the shapes that are known go through."""
        with self._lock:
            return self._shapes.graphs()

    # -- opening ----------------------------------------------------------------------------------

    def open(self, name: str, devices: Sequence[Device], host: Host) -> Sequence[Instance]:
        check_loaded(self.pipe, name, devices[0].stages)
        claim(self, type(self.pipe).__name__, models_of(self.pipe))
        self._host, self._serves = host, True
        self._rehearsals = Rehearsals(self._batches, self._measure_s, self._learnt)
        self.observers = (Doubts(self._measured), self._rehearsals)
        self._places = Places(self.pipe, devices, host, self._replica, self._profile_cache)
        self._steps = StepCounts(self.pipe)
        self._shapes = Shapes(name, self._batches, self._max_shapes)
        probe = f"{name}/probe" if name else "probe"
        self._probe = Graph(probe, Stage(probe, max_batch=1))
        samples = self._samples
        if samples is None:
            usual = default_sample(self.pipe, self._places.first.parts.device)
            samples = [] if usual is None else [usual]
        self._previews = PreviewStages(
            self._places.replicas, self._places.devices, host, check_finite=self._check_finite
        )
        roles = [f"{name}/{role}" if name else role for role in self._places.first.stage_roles]
        instances = self._places.probes(probe, frozenset(roles))
        for sample in samples:
            opened = self._open_sample(sample)
            instances = [one.with_(more) for one, more in zip(instances, opened, strict=True)]
        return instances

    def _replica(self, pipe: DiffusionPipeline) -> Replica:
        return Replica(pipe, check_finite=self._check_finite, **self._how)

    def _profile_cache(self, pipe: DiffusionPipeline) -> ProfileCache:
        return ProfileCache(pipe, self._profiles, {**self._how, **self._batches}, self._cache)

    def _open_sample(self, sample: Mapping[str, Any]) -> list[Instance]:
        """Measure a sample on each device, before anybody is served; nothing if it is known."""
        named = named_arguments(self.pipe, (), sample)
        try:
            whole = self._checked(named)
        except Exception as error:  # whatever the pipeline has against it
            raise BackendError(f"samples: {dict(sample)}: {error}") from error
        asked = self._asked(named, whole, None)
        dimensions = self._places.dimensions(asked)
        shape = self._shapes.get(dimensions)
        opened = [Instance({}, {}) for _ in self._places.replicas]
        if shape is None:
            shape = self._new(asked, dimensions)
            opened = self._places.measure(shape, asked, self._measure_s, self._show)
            self._shapes.keep(shape)
        self._shapes.note(asked.kind, shape, dimensions.rows)
        return opened

    def learn(self, like: Mapping[str, Any]) -> list[Instance]:
        """See `Shaped`."""
        opened = self._open_sample(like)
        call = self.request(**like)
        assert isinstance(call, Call)
        self._generators.free(like)
        return opened  # its shape stays open: an agent's graph has it

    # -- requests ---------------------------------------------------------------------------------

    def request(self, *args: Any, on_step: Callable[[Progress], None] | None = None, **kwargs: Any) -> Call | Probe:
        """One call of the pipeline, with its own arguments.

        The stock call looks at them first, without any model, and raises what it has against them.
        A call of a kind that was not seen before is looked at on the device, up to its first
        denoising step, as a step of its own.

        Args:
            on_step: told of each denoising step, with the latents, on the device's thread.

        In place of all that it takes one `Progress.preview()`: the picture of that step.
        """
        if len(args) == 1 and isinstance(args[0], Preview) and not kwargs and on_step is None:
            return self._preview(args[0])
        check_callable("on_step", on_step)
        named = named_arguments(self.pipe, args, kwargs)
        if why := self._places.refused or self._places.first.changed():
            raise RequestError(why)
        whole = self._checked(named)
        asked = self._asked(named, whole, on_step)
        self._generators.take(named)
        with self._lock:
            known = self._shapes.of_kind(asked.kind)
            if known is not None:
                return self._call(asked, *known)
        params = {"arguments": without_side_effects(named, asked.whole)}
        free = partial(self._generators.free, named)
        return Probe(self._probe, params, partial(self._probed, asked), free)

    def _checked(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments with the pipeline's defaults, after the stock call looked at them."""
        return check(self.pipe, named, self._places.first.parts.device, self._max_pixels)

    def _asked(
        self, named: dict[str, Any], whole: Mapping[str, Any], on_step: Callable[[Progress], None] | None
    ) -> StockCall:
        steps, samples = self._steps.of(whole), samples_of(whole)
        return StockCall(named, whole, kind_of(whole), steps, samples, on_step, stepped_of(self.pipe))

    def _probed(self, asked: StockCall, result: Result) -> Call:
        """The call, now that its dimensions are known."""
        dimensions: Dimensions = result.unwrap()["dimensions"]
        with self._lock:
            shape = self._shapes.get(dimensions)
            if shape is None:
                shape = self._open_new(asked, dimensions)
            self._shapes.note(asked.kind, shape, dimensions.rows)
            return self._call(asked, shape, dimensions.rows)

    def _call(self, asked: StockCall, shape: Shape, rows: int) -> Call:
        shape.open += 1
        params = {
            "arguments": asked.named,
            "steps": asked.steps,
            "rows": rows,
            "samples": asked.samples,
            "on_step": asked.on_step,
            "stepped": asked.stepped,
        }
        return Call(shape.graph, params, _output, over=partial(self._over, asked, shape))

    def _preview(self, preview: Preview) -> Call:
        with self._lock:
            return self._previews.call(preview, self._shapes, self._one_less)

    def _over(self, asked: StockCall, shape: Shape) -> None:
        self._one_less(shape)
        self._generators.free(asked.named)

    # -- shapes -----------------------------------------------------------------------------------

    def _new(self, asked: StockCall, dimensions: Dimensions) -> Shape:
        roles = self._places.first.stage_roles
        return self._shapes.make(dimensions, roles, dimensions.rows, asked.samples)

    def _open_new(self, asked: StockCall, dimensions: Dimensions) -> Shape:
        """Serve calls of a new shape from now on, with profiles that are found or guessed."""
        surplus = self._shapes.surplus()
        if surplus is not None:
            self._forget(surplus)
        shape = self._new(asked, dimensions)
        self._places.open(shape, self._shapes.nearest(dimensions, dimensions.rows), self._batches)
        self._shapes.keep(shape)
        if shape.measured is None:
            self._rehearsals.add(shape, shortened(asked.named, None, asked.whole), asked.whole)
        return shape

    def _forget(self, shape: Shape) -> None:
        self._shapes.forget(shape)
        self._rehearsals.forget(shape)
        self._places.retire(shape)

    # -- while it idles ---------------------------------------------------------------------------

    def rehearsal(self) -> Sequence[Call]:
        with self._lock:
            shape, params = self._rehearsals.next()
            if shape is None:
                return ()
            shape.open += len(params)
            over = partial(self._one_less, shape)
            return [Call(shape.graph, one, _nothing, over=over) for one in params]

    def _one_less(self, shape: Shape) -> None:
        with self._lock:
            shape.open -= 1

    def _learnt(self, shape: Shape, measured: Mapping[str, list[Measurement]]) -> None:
        """Steps of a shape were timed while the device idled: keep it, for the next time."""
        self._places.keep(shape, measured)

    def _measured(self, stage: str) -> bool:
        with self._lock:
            return self._shapes.measured(stage)

    def make_way(self) -> bool:
        self._host.make_way()
        return not self._serves

    def close(self) -> None:
        if not self._serves:  # another service may
            return
        self.observers = ()
        self._rehearsals.clear()
        try:
            self.pipe.maybe_free_model_hooks()
        finally:
            free(self, [model for _, model in models_of(self.pipe)])
            self._serves = False  # at last: whoever wants the model waits for its host until then


def _check_options(
    profiles: object,
    samples: object,
    buckets: object,
    compile: object,
    graphs: object,
    check_finite: object,
    cache: object,
    progress: object,
) -> None:
    """BackendError, by its name, for an option of another kind than it can be."""
    check_option("profiles", profiles, Mapping | Path | str | None, "profiles by stage, or their folder")
    check_option("compile", compile, bool | Mapping, "True, False, or arguments of torch.compile")
    check_option("graphs", graphs, bool | None, "True, False or None")
    check_option("check_finite", check_finite, bool, "True or False")
    check_option("cache", cache, Path | str | None, "a folder")
    check_option("progress", progress, bool | None, "True, False or None")
    check_option("buckets", buckets, list | tuple | range, "a list of whole numbers")
    check_option("samples", samples, list | tuple | None, "a list of the arguments of calls, by name")
    assert samples is None or isinstance(samples, list | tuple)
    for sample in samples or ():
        check_option("samples", sample, Mapping, "a list of the arguments of calls, by name")


def _nothing(*_: Any) -> None:
    """Nobody wants what comes of a rehearsal."""


def _output(result: Result, outputs: Sequence[Emitted]) -> Any:
    """What the pipeline returned; RequestFailed if the request has none, and why."""
    output = result.unwrap()
    if "output" not in output:
        reason = "the pipeline's call did not end with its last stage"
        raise RequestFailed(f"request {result.id!r}: {reason}", reason=reason)
    return output["output"]
