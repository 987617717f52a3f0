"""The ways to serve diffusion requests that benchmarks/diffusion.py compares.

Without an engine: the stock pipeline, called for one request after the other or for batches of requests that
stock can take together (a bare loop is in diffusion_bare.py). With one: `submitted`, and `queued_submitted` for
requests that arrive. All make the same images, as numpy arrays on the host. `simulated` is what the simulator
says of the last.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_models import Model

from neustream import (
    POLICIES,
    SLO,
    BackendError,
    Graph,
    LatencyProfile,
    Request,
    RequestError,
    Stage,
    loop,
    seq,
    serve,
    simulate,
)
from neustream.backends.diffusers import PipelineMount
from neustream.core.node import Node
from neustream.core.observed import CorrectedProfile
from neustream.engine.events import Finished, Record
from neustream.service.service import Service

Image = np.ndarray[Any, Any]
ROLES = ("encode", "denoise", "decode")
STATIC_BATCH = 8


@dataclass(frozen=True)
class Ask:
    """One image; `arrival` and `slo` (from then on) are seconds."""

    steps: int
    guidance: float
    seed: int
    arrival: float = 0.0
    slo: float = float("inf")

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    @property
    def alike(self) -> Hashable:
        """What one stock call can have only one of."""
        return self.steps, self.guidance

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.seed)


def arguments(model: Model, asks: Sequence[Ask]) -> dict[str, Any]:
    """Of one call of the pipeline for `asks`, which are alike."""
    return {
        **model.subjects([ask.seed for ask in asks]),
        "num_inference_steps": asks[0].steps,
        "guidance_scale": asks[0].guidance,
        "generator": [ask.generator for ask in asks],
        "output_type": "np",
    }


# -- the engine -------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A pipeline, how it is to be served, and its profiles once they are measured."""

    model: Model
    stock: Model
    settings: argparse.Namespace
    profiles: Mapping[str, LatencyProfile] = field(default_factory=dict)

    @property
    def batches(self) -> dict[str, int]:
        """The most requests in a step, by role."""
        most = self.settings.max_batch
        return {"encode": most, "denoise": most, "decode": min(self.settings.decode_batch, most)}

    def engine(self, policy: str, **options: Any) -> Service:
        """An engine that has seen requests with guidance and without."""
        shapes = [Ask(max(self.settings.steps), guidance, seed=0) for guidance in self.settings.guidance]
        shapes.sort(key=lambda ask: not ask.guided)
        most = {("max" if role == "denoise" else role) + "_batch": size for role, size in self.batches.items()}
        given = {"profiles": dict(self.profiles)} if self.profiles else {}
        engine: Service = serve(
            self.model.pipe,
            samples=[arguments(self.model, [ask]) for ask in shapes],
            policy=policy,
            compile=self.settings.compile,
            **{**most, **given, **options},
        )
        return engine

    def measure(self, out: Path | None = None) -> None:
        """Measure the profiles; copies of their files go to `out`."""
        with tempfile.TemporaryDirectory() as cache:
            with self.engine("fcfs", cache=Path(cache), measure_s=self.settings.measure_s) as engine:
                self.profiles = dict(engine.profiles)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                for path in Path(cache).glob("profiles/*/*.json"):
                    shutil.copy(path, out / path.name)

    def load(self, folder: Path) -> None:
        """Take the profiles that `measure` left in `folder`."""
        with self.engine("fcfs", profiles=folder) as engine:
            self.profiles = dict(engine.profiles)

    @property
    def roles(self) -> list[str]:
        """What its stages do: a DiT is told no text, and encodes none."""
        return [role for role in ROLES if any(stage.startswith(role) for stage in self.profiles)]

    def profile(self, role: str) -> LatencyProfile:
        return next(profile for stage, profile in self.profiles.items() if stage.startswith(role))

    def size(self, ask: Ask) -> float:
        """What a request counts as in a denoising step: the profile's unit is a request with guidance, if there are."""
        rows = [1 + (guidance > 1) for guidance in self.settings.guidance]
        return float((1 + ask.guided) / max(rows))

    def solo(self, ask: Ask) -> float:
        """Seconds of a request that has the device to itself, by the profiles."""
        step = self.profile("denoise").latency(1, self.size(ask), self.size(ask) ** 2)
        around = [self.profile(role).latency(1) for role in self.roles if role != "denoise"]
        return sum(around) + ask.steps * step

    def capacity(self, asks: Sequence[Ask]) -> float:
        """Requests per second if every step had the batch that costs least a request."""
        best: dict[str, float] = {}
        for role in self.roles:
            profile = self.profile(role)
            best[role] = min(profile.latency(b) / b for b in range(1, profile.max_batch + 1))
        denoising = statistics.fmean(ask.steps * self.size(ask) for ask in asks) * best.pop("denoise")
        return 1 / (denoising + sum(best.values()))


class Forwards:
    """Seconds in the forwards of an engine's denoisers, and in its denoising steps around them. An observer."""

    def __init__(self) -> None:
        self.steps = 0
        self.wall = 0.0
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def watch(self, engine: Service) -> None:
        for mount in engine.models.values():
            assert isinstance(mount, PipelineMount)
            timed = self._on_cuda if mount.pipe.device.type == "cuda" else self._on_host
            for part in mount.parts("denoise"):
                part.function = partial(timed, part.function)

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished) and record.step.stage.startswith("denoise"):
            self.steps += 1
            self.wall += record.at - record.step.started_at

    def _on_host(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        self._seconds += time.perf_counter() - began
        return result

    def _on_cuda(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = function(*args, **kwargs)
        end.record()
        self._events.append((start, end))
        return result

    @property
    def seconds(self) -> float:
        if self._events:
            torch.cuda.synchronize()
        return self._seconds + sum(float(start.elapsed_time(end)) for start, end in self._events) / 1e3


@contextmanager
def watched(bench: Bench, policy: str) -> Iterator[tuple[Service, Forwards]]:
    """An engine, and its forwards from now on."""
    forwards = Forwards()
    with bench.engine(policy, observers=[forwards]) as engine:
        forwards.watch(engine)
        yield engine, forwards


def batch_of(report: Mapping[str, Any]) -> float | None:
    """The mean batch of a denoising step."""
    return next((size for stage, size in report["batch_size"].items() if stage.startswith("denoise")), None)


def simulated(bench: Bench, policy: str, asks: Sequence[Ask], slower: Mapping[str, float]) -> dict[str, Any]:
    """What the simulator says: the pipeline as a plain graph, under the engine's profiles and batch sizes.

    `slower` is by how much steps take longer than profiled, by role.
    """
    stages = {role: Stage(role, max_batch=most, size=partial(share, role)) for role, most in bench.batches.items()}
    nodes: dict[str, Node] = {**stages, "denoise": loop(stages["denoise"], times=lambda job: job.params["steps"])}
    graph = Graph("pipeline", seq(*[nodes[role] for role in bench.roles]))
    requests = [
        Request(str(at), graph, ask.arrival, SLO(total=ask.slo), {"steps": ask.steps, "size": bench.size(ask)})
        for at, ask in enumerate(asks)
    ]
    profiles = {role: CorrectedProfile(bench.profile(role), {0: slower.get(role, 1.0)}) for role in bench.roles}
    report = simulate(graph, profiles, requests, policy=POLICIES[policy]())
    told = report.to_dict()
    return {
        "on_time": report.counts["on_time"],
        "goodput_rps": report.goodput,
        "attainment": report.attainment,
        "latency_s": told["latency_s"],
        "images_s": report.latency.count / report.duration,
        "batch": batch_of(told),
    }


def share(role: str, job: Any) -> float:
    size: float = job.params["size"] if role == "denoise" else 1.0
    return size


# -- all at once ------------------------------------------------------------------------------------


def one_by_one(model: Model, asks: Sequence[Ask]) -> list[Image]:
    """The stock pipeline, in order."""
    return [model.pipe(**arguments(model, [ask])).images[0] for ask in asks]


def in_batches(model: Model, asks: Sequence[Ask], most: int) -> list[Image]:
    """The stock pipeline with lists of prompts and generators: one call for those of equal steps and guidance."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for at, ask in enumerate(asks):
        groups[ask.alike].append(at)
    images: dict[int, Image] = {}
    for group in groups.values():
        for start in range(0, len(group), most):
            some = group[start : start + most]
            made = model.pipe(**arguments(model, [asks[at] for at in some])).images
            images.update(zip(some, made, strict=True))
    return [images[at] for at in range(len(asks))]


def submitted(engine: Service, model: Model, asks: Sequence[Ask]) -> list[Image]:
    """Through the engine."""
    answers = [engine.submit(**arguments(model, [ask])) for ask in asks]
    return [answer.result().images[0] for answer in answers]


# -- as they arrive: the instants at which the images were there, None for requests without one ---------


def _clock() -> Callable[[], float]:
    began = time.perf_counter()
    return lambda: time.perf_counter() - began


def arriving(asks: Iterable[Ask], now: Callable[[], float]) -> Iterator[Ask]:
    """Each request at its arrival, or as soon as it is asked for."""
    for ask in asks:
        if (ahead := ask.arrival - now()) > 0:
            time.sleep(ahead)
        yield ask


def queued_one_by_one(model: Model, asks: Sequence[Ask]) -> list[float | None]:
    """A server that calls the stock pipeline for one request at a time, first come, first served."""
    now, ends = _clock(), list[float | None]()
    for ask in arriving(asks, now):
        one_by_one(model, [ask])
        ends.append(now())
    return ends


def queued_in_batches(model: Model, asks: Sequence[Ask], most: int = STATIC_BATCH) -> list[float | None]:
    """A server that batches stock calls, as far as stock allows.

    When a call is over, the oldest waiting request is served next, together with those waiting requests, oldest
    first, that have its step count and guidance: `most` in all. Nobody is waited for.
    """
    now, ends = _clock(), dict[int, float]()
    coming, waiting = deque(range(len(asks))), list[int]()
    while coming or waiting:
        if not waiting:
            time.sleep(max(asks[coming[0]].arrival - now(), 0.0))
        while coming and asks[coming[0]].arrival <= now():
            waiting.append(coming.popleft())
        if not waiting:
            continue
        batch = [at for at in waiting if asks[at].alike == asks[waiting[0]].alike][:most]
        in_batches(model, [asks[at] for at in batch], most)
        ends.update(dict.fromkeys(batch, now()))
        waiting = [at for at in waiting if at not in ends]
    return [ends[at] for at in range(len(asks))]


def queued_submitted(
    engine: Service, model: Model, asks: Sequence[Ask], lags: list[float] | None = None
) -> list[float | None]:
    """Through the engine, which is promised what is left of the SLO when a request is handed to it.

    `lags` is told how long after its arrival each request was accepted.
    """
    now, ends = _clock(), dict[int, float]()

    def note(at: int, answer: Future[Any]) -> None:
        if answer.exception() is None:
            ends[at] = now()

    answers = []
    for at, ask in enumerate(arriving(asks, now)):
        left = max(ask.arrival + ask.slo - now(), 1e-3)
        answers.append(engine.submit(**arguments(model, [ask]), slo=left))
        if lags is not None:
            lags.append(now() - ask.arrival)
        answers[-1].add_done_callback(partial(note, at))
    for answer in answers:
        error = answer.exception()
        if error is not None and not isinstance(error, RequestError):
            raise error
        if answer.ended is not None and answer.ended.status == "failed":
            raise BackendError(f"request {answer.id} failed: {answer.ended.reason}")
    return [ends.get(at) for at in range(len(asks))]
