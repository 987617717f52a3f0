"""Pipelines of diffusers, served: what checking costs, and a storm of requests.

    OMP_NUM_THREADS=1 python benchmarks/served_pipelines.py checks [--requests 30] [--steps 20]
    OMP_NUM_THREADS=1 python benchmarks/served_pipelines.py storm [--requests 1000] [--threads 32]

`checks`: microseconds that go into seeing whether a pipeline was changed: one look at all modules of a pipeline, and
what a tiny one that is served spends of it at each submit and at each step, beside that submit and step. The large
pipeline has the denoiser and the VAE of Stable Diffusion 1.5, on torch's meta device: what is looked at are modules and
their attributes, never weights.

`storm`: that many threads ask a tiny Stable Diffusion for images of two sizes, with other steps, guidance, prompts and
seeds. Of the requests one in twenty has arguments that are none, one in twenty a callback in the call that raises, one
in twenty one behind it, and one in ten is cancelled, at once or in a step. Each must be answered once. Images of the
good ones must be those of the stock call up to rounding, which two different requests never are.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from all_pipelines import Flat
from arguments import at_least_one
from greenlet import GreenletExit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    import diffusers as d
    from tiny_pipelines import build

    from neustream.backends.diffusers.parts import models_of
    from neustream.backends.diffusers.state import State

import neustream as ns
from neustream.engine.events import Finished, Record

REPEATS = 200
TOLERANCE = 1e-4
"""The largest difference of two images that are the same: rounding, in batches of other sizes."""
ANSWER_S = 300.0

# -- what checking costs ---------------------------------------------------------------------------


def large() -> Any:
    """Stable Diffusion 1.5 without its text encoder."""
    four = (128, 256, 512, 512)
    with torch.device("meta"):
        unet = d.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        vae = d.AutoencoderKL(
            block_out_channels=four,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    scheduler = d.DDIMScheduler()
    return d.StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)


class Looks:
    """Times looks at what a pipeline was, while it is used as a context manager."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._look = State.changed

    def __enter__(self) -> Looks:
        def timed(state: State, *, sampled: bool = False) -> str:
            began = time.perf_counter()
            why = self._look(state, sampled=sampled)
            self.seconds.append(time.perf_counter() - began)
            return why

        State.changed = timed  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        State.changed = self._look  # type: ignore[method-assign]


def checks(args: argparse.Namespace) -> None:
    for name, pipe in (("of the size of Stable Diffusion 1.5", large()), ("a tiny one", tiny())):
        modules = sum(1 for _, model in models_of(pipe) for _ in model.modules())
        state = State(pipe, models_of, lambda: False)
        look = statistics.median([_seconds(partial(state.changed, sampled=True)) for _ in range(REPEATS)])
        print(f"{name}: {look * 1e6:.0f} us a look at {modules} modules, {look / modules * 1e6:.2f} each")
    submits: list[float] = []
    steps = Steps()
    with served(tiny(), observers=[steps]) as service:
        service(**call(0, 2))
        steps.seconds.clear()
        with Looks() as looks:
            at_submit = 0.0
            for at in range(args.requests):
                before = len(looks.seconds)
                given = call(at % 4, args.steps)
                began = time.perf_counter()
                answer = service.submit(**given)
                submits.append(time.perf_counter() - began)
                at_submit += looks.seconds[before]
                answer.result()
    at_steps, count = sum(looks.seconds) - at_submit, len(steps.seconds)
    print(f"a submit: {statistics.mean(submits) * 1e6:.0f} us, of which looking {at_submit / args.requests * 1e6:.0f}")
    print(f"a step: {statistics.mean(steps.seconds) * 1e6:.0f} us, of which looking {at_steps / count * 1e6:.0f}")
    print(f"{len(looks.seconds) - args.requests} looks in {count} steps of {args.requests} requests, one at a time")


class Steps:
    """An observer: how long steps took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished):
            self.seconds.append(record.at - record.step.started_at)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# -- the storm -------------------------------------------------------------------------------------

WRONG: tuple[dict[str, Any], ...] = (
    {"num_inference_steps": 0},
    {"num_inference_steps": "4"},
    {"guidance_scale": float("nan")},
    {"guidance_scale": "5"},
    {"height": 17},
    {"height": -8},
    {"prompt": None},
    {"prompt": 5},
    {"prompt": "half a \ud800 letter"},
    {"generator": 7},
    {"callback_on_step_end": "print"},
    {"slo": "5"},
)
RAISED = (ValueError("mine"), LookupError(), SystemExit(1), KeyboardInterrupt(), GreenletExit())
VARIANTS = tuple(itertools.product((16, 24), (2, 3, 5), (1.0, 4.0), range(4)))
"""Height, steps, guidance and seed of the images that are asked for."""


def tiny() -> Any:
    """A Stable Diffusion with random weights, as in the sweep of all pipelines."""
    pipe = build("StableDiffusionPipeline").pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def served(pipe: Any, **options: Any) -> ns.Service:
    service: ns.Service = ns.serve(pipe, profiles=Flat(), samples=[], progress=False, **options)
    return service


def call(seed: int, steps: int, guidance: float = 4.0, height: int = 16) -> dict[str, Any]:
    """Arguments of one image."""
    generator = torch.Generator().manual_seed(seed)
    how = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": 16}
    return {"prompt": f"a cat number {seed}", **how, "generator": generator, "output_type": "pt"}


class Storm:
    """What was asked, and what came of it.

    Attributes:
        answered: how often each request that was accepted was answered.
        good: the variant of each request that is to be served, and its images.
    """

    def __init__(self, service: ns.Service, seed: int) -> None:
        self.service = service
        self.answered: Counter[int] = Counter()
        self.good: list[tuple[int, torch.Tensor]] = []
        self._seed = seed

    def ask(self, number: int) -> str:
        """One request of some kind, waited for: what came of it."""
        draw = random.Random(f"{self._seed}/{number}")
        kind, variant = draw.random(), draw.randrange(len(VARIANTS))
        height, steps, guidance, seed = VARIANTS[variant]
        given = call(seed, steps, guidance, height)
        if kind < 0.05:
            return self._wrong({**given, **draw.choice(WRONG)})
        if kind < 0.10:
            given |= raising(draw)
        late = 0.20 <= kind < 0.25
        answers: list[ns.Answer[Any]] = []
        if late:
            given["on_step"] = lambda progress: answers and answers[0].cancel()
        answer = self.service.submit(**given)
        answers.append(answer)
        answer.add_done_callback(lambda done: self._told(number, raises=0.10 <= kind < 0.15))
        if 0.15 <= kind < 0.20:
            answer.cancel()
        status = answer.outcome(ANSWER_S).status
        if status == "done":
            self.good.append((variant, answer.result().images))
            return "done" if kind >= 0.10 else "A RAISING ONE WAS SERVED"
        if status == "failed":
            return status if kind < 0.10 else "A GOOD ONE FAILED"
        return status if 0.15 <= kind < 0.25 else f"A GOOD ONE WAS {status.upper()}"

    def _wrong(self, given: Mapping[str, Any]) -> str:
        try:
            self.service.submit(**given)
        except (ns.RequestError, ValueError, TypeError):
            return "refused"
        return f"WRONG ARGUMENTS ACCEPTED: {given}"

    def _told(self, number: int, *, raises: bool) -> None:
        self.answered[number] += 1
        if raises:
            raise SystemExit(1)

    def off(self, stock: list[torch.Tensor]) -> list[float]:
        """How far the good images are from stock's, at most, each."""
        return [float((images - stock[variant]).abs().max()) for variant, images in self.good]


def raising(draw: random.Random) -> dict[str, Any]:
    """A callback that raises something in one of the steps."""
    error, step = draw.choice(RAISED), draw.randrange(2)

    def on_step(progress: Any) -> None:
        if progress.step == step + 1:
            raise error

    def at_end(pipe: Any, at: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            raise error
        return kept

    return {"on_step": on_step} if draw.random() < 0.5 else {"callback_on_step_end": at_end}


def stock_images(pipe: Any) -> list[torch.Tensor]:
    """What the stock call gives for each variant; all of them differ from each other."""
    images = [pipe(**call(seed, steps, guidance, height)).images for height, steps, guidance, seed in VARIANTS]
    for one, other in itertools.combinations(images, 2):
        if one.shape == other.shape and float((one - other).abs().max()) < 10 * TOLERANCE:
            raise SystemExit("two variants give the same image: nothing would be noticed")
    return images


def storm(args: argparse.Namespace) -> None:
    logging.getLogger("neustream").setLevel(logging.CRITICAL + 1)  # a line for each callback that raises
    pipe = tiny()
    stock = stock_images(pipe)
    began = time.perf_counter()
    with served(pipe) as service:
        tried = Storm(service, args.seed)
        with ThreadPoolExecutor(args.threads) as threads:
            outcomes = Counter(threads.map(tried.ask, range(args.requests)))
        still_open = service.snapshot().open
        after = float((service(**call(0, 2, 1.0)).images - stock[0]).abs().max())
    seconds = time.perf_counter() - began
    off = tried.off(stock)
    wrong = sum(not one <= TOLERANCE for one in off)
    twice = sum(count != 1 for count in tried.answered.values())
    lost = args.requests - outcomes["refused"] - len(tried.answered)
    print(f"{args.requests} requests of {args.threads} threads in {seconds:.1f} s: {dict(outcomes)}")
    print(f"other images than stock: {wrong} of {len(off)} (largest difference {max(off):.1e});", end=" ")
    print(f"answered more than once: {twice}, never: {lost}; open: {still_open}")
    if wrong or twice or lost or still_open or after > 0 or any(name[0].isupper() for name in outcomes):
        raise SystemExit("the storm did harm")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    of_checks = commands.add_parser("checks")
    of_checks.add_argument("--requests", type=at_least_one, default=30)
    of_checks.add_argument("--steps", type=at_least_one, default=20)
    of_checks.set_defaults(run=checks)
    of_storm = commands.add_parser("storm")
    of_storm.add_argument("--requests", type=at_least_one, default=1000)
    of_storm.add_argument("--threads", type=at_least_one, default=32)
    of_storm.add_argument("--seed", type=int, default=0)
    of_storm.set_defaults(run=storm)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
