"""Step latencies of a language model, learnt from the steps that run."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from statistics import median

import numpy as np
from numpy.typing import NDArray

from neustream.core.contrast import Contrast
from neustream.core.observed import BLOCK, Ratios
from neustream.core.steps import Step, StepLatency
from neustream.core.types import TICK
from neustream.errors import ProfileError

Floats = NDArray[np.float64]

FEATURES = 6
NOTHING = (0.0,) * FEATURES
REFIT = 16
"""Observed steps after which a fit from nothing is made anew."""
MEMORY = 512.0
"""Observed steps after which one counts 1/e."""
WINDOW = 64
"""Latest steps that the error is a median of."""
LATEST = 7
"""Latest steps whose median ratio is believed at once where nothing was measured."""
DRIFT = 4.0
"""That factor is at most so large, and at least its inverse."""
LONG = 4096.0
"""The same beside a measured profile: what it lacks is known when phases and noise are averaged."""
TRUST = 32.0
"""A measured profile weighs as much as so many steps."""
DOUBT = 2.0
"""What is learnt beside one counts for nothing until it explains so many times what noise would."""
LATER = 512
"""Blocks of steps that took what was expected are taken in so many at once: they say nothing."""
KEPT = 8192
"""Contexts of which it is kept what a decode alone takes; each job's is asked at each output."""


class Fit:
    """A linear function of a step's numbers, fitted by ridge regression; old steps fade out.

    The numbers: 1, new tokens, squares, whether there is a prefill, decodes, context.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.weights: tuple[float, ...] = NOTHING
        self.steps = 0.0
        self._gram = np.zeros((FEATURES, FEATURES))
        self._moment = np.zeros(FEATURES)
        self._square = 0.0
        self._exact: list[Sequence[tuple[Step, float]]] = []

    @property
    def untaught(self) -> bool:
        """Whether all steps so far took what was expected."""
        return not self._moment.any()

    def __call__(self, step: Step) -> float:
        a, b, c, d, e, f = self.weights
        prefills, tokens, square, decodes, context = step
        return (
            a
            + b * tokens
            + c * square * 1e-3
            + (d if prefills else 0.0)
            + e * decodes
            + f * context * 1e-2
        )

    def decodes(self, batch: Floats, context: Floats) -> Floats:
        """The same of many decodes [...], to the bit."""
        a, _, _, _, e, f = self.weights
        found: Floats = a + e * batch + f * context * 1e-2
        return found

    def add(self, steps: Sequence[Step], targets: Floats, sizes: Floats) -> None:
        """Steps in a row, what the function should be of each, and what its error is a share of."""
        self._take_exact()
        x, y = _numbers(steps) / sizes[:, None], targets / sizes
        kept = (1 - 1 / self.memory) ** len(steps)
        self.steps = self.steps * kept + len(steps)
        self._gram = self._gram * kept + x.T @ x
        self._moment = self._moment * kept + x.T @ y
        self._square = self._square * kept + float(y @ y)

    def add_exact(self, steps: Sequence[tuple[Step, float]]) -> None:
        """A block of steps of which the function should be 0, each with what its error is a share
        of."""
        self.steps = self.steps * (1 - 1 / self.memory) ** len(steps) + len(steps)
        self._exact.append(steps)
        if len(self._exact) >= LATER:
            self._take_exact()

    def _take_exact(self) -> None:
        """Take in the blocks of which it is 0."""
        if not self._exact:
            return
        blocks, self._exact = self._exact, []
        steps, sizes = zip(*chain.from_iterable(blocks), strict=True)
        lengths = [len(block) for block in blocks]
        ends = np.cumsum(lengths)
        kept = 1 - 1 / self.memory
        faded = kept ** np.repeat(ends[-1] - ends, lengths)
        x = _numbers(steps) / np.array(sizes)[:, None]
        before = float(kept ** ends[-1])
        self._gram = self._gram * before + (x * faded[:, None]).T @ x
        self._moment = self._moment * before
        self._square *= before

    def solve(self, ridge: float, *, rising: bool) -> None:
        """Ridge, scaled by each number's own size; `rising`: without negative coefficients."""
        if not self._moment.any():  # all steps were as expected: nothing is to be explained
            self.weights = NOTHING
            return
        scale = np.sqrt(np.maximum(np.diag(self._gram), 1e-12))
        gram, moment = self._gram / np.outer(scale, scale), self._moment / scale
        active = scale > 1e-5
        weights = np.zeros(FEATURES)
        for _ in range(FEATURES):
            weights[:] = 0.0
            features = np.flatnonzero(active)
            if not len(features):
                break
            system = gram[np.ix_(features, features)] + np.diag(np.full(len(features), ridge))
            weights[features] = np.linalg.solve(system, moment[features])
            if not rising or not (weights < 0).any():
                break
            active &= weights >= 0
        self.weights = tuple((weights / scale).tolist())

    def doubt(self) -> None:
        """Shrink the function by what noise alone would have explained, as James and Stein do."""
        if not any(self.weights):
            return
        explained = float(self._moment @ np.array(self.weights))
        noise = max(self._square - explained, 0.0) / self.steps
        share = 1 - DOUBT * FEATURES * noise / explained if explained > 0 else 0.0
        self.weights = tuple([max(share, 0.0) * weight for weight in self.weights])


def _numbers(steps: Sequence[Step]) -> Floats:
    """What steps are known by [steps, numbers]."""
    return np.array(
        [
            (1.0, tokens, square * 1e-3, 1.0 if prefills else 0.0, decodes, context * 1e-2)
            for prefills, tokens, square, decodes, context in steps
        ]
    )


class LearntSteps:
    """Step latencies learnt from the steps that run, starting from a profile or from nothing.

    What is learnt is a linear function of a step's numbers (`Fit`), times how many times as long
    steps take lately.

    With a measured `base` the function is added to it, and the factor is what lasts
    (`Ratios.usual`): a phase of the device is none of its speed. What prompts add to the decodes of
    a step takes `Contrast` times as long besides, which is known after a few such steps. The
    function is fitted to blocks
    of steps, each step over what its block took on average, so that phases do not get into it, and
    errors count as shares of the profile. It is shrunk by what noise would explain.

    Without a base the function is all there is. Coefficients that would make a step cheaper for
    more work are left out. The factor is the median of observed over fitted of the latest few
    steps, which follows a device that changed its speed at once; a step counts as at most four
    times what was expected, so that a first call that compiles does not spoil the fit. Until steps
    were seen, a step takes `guess_s`.

    `error`: by how much single steps miss, as a share: beside a base the median distance to what
        such steps usually take (`Ratios.error`), else the median of |predicted / observed - 1| over
        the latest steps, each predicted before it ran.
    """

    def __init__(
        self, base: StepLatency | None = None, *, name: str = "", guess_s: float = 0.02
    ) -> None:
        if base is None and not guess_s > 0:
            raise ProfileError(f"learnt steps: guess_s must be greater than 0, got {guess_s!r}")
        self.base = base
        self.name = name or (base.name if base else "steps")
        self.device = base.device if base else ""
        self.observed = 0
        self._guess_s = guess_s
        self._errors: deque[float] = deque(maxlen=WINDOW)
        self._fit = Fit(MEMORY if base is None else LONG)
        self._mean = 0.0
        self._ratios = Ratios(LATEST) if base is None else Ratios()
        self._factor = 1.0
        self._contrast = Contrast()
        self._block: list[tuple[Step, float, float, float, float]] = []
        self._lone: dict[float, float] = {}  # seconds of a decode alone, by its context
        self._beside_prompts = (0, 0.0), 0.0
        self._steady = base is not None and not getattr(base, "learns", False)

    @property
    def learns(self) -> bool:
        return True

    @property
    def error(self) -> float:
        """Median relative error of single steps lately; 0 before the first."""
        if self.base is not None:
            return self._ratios.error
        return median(self._errors) if self._errors else 0.0

    def profiled(self, step: Step) -> float:
        if self.base is None:
            return self.seconds(step)
        measured: float = getattr(self.base, "profiled", self.base.seconds)(step)
        return measured

    def seconds(self, step: Step) -> float:
        if step.prefills:
            apart = self._apart(step) if self._contrast.times != 1.0 else 0.0
            return self._factor * self._contrasted(self._fitted(step), apart)
        return self._factor * self._fitted(step)

    def lone(self, context: float) -> float:
        """Seconds of one decode alone."""
        seconds = self._lone.get(context)
        if seconds is None:
            seconds = self._factor * self._fitted(Step(decodes=1, context=context))
            if not self._steady:
                return seconds
            if len(self._lone) >= KEPT:
                self._lone.clear()
            self._lone[context] = seconds
        return seconds

    def _fitted(self, step: Step) -> float:
        if self.base is not None:
            return self._with(self.base.seconds(step), step)
        if not self.observed:
            return self._guess_s
        return max(self._fit(step), self._mean / 16, 1e-6)

    def _with(self, base: float, step: Step) -> float:
        """What the base says of a step, and what is learnt beside it."""
        if self._fit.weights is NOTHING:
            return base
        return max(base + self._fit(step), base / 4)

    def _apart(self, step: Step) -> float:
        """The part of a fitted step that its decodes would take without prompts; 0 if none is.

        The latest is kept: rules ask for many prompts beside the same decodes.
        """
        if self.base is None or not step.decodes:
            return 0.0
        asked = step.decodes, step.context
        if self._beside_prompts[0] != asked or not self._steady:
            self._beside_prompts = (
                asked,
                self._fitted(Step(decodes=step.decodes, context=step.context)),
            )
        return self._beside_prompts[1]

    def _contrasted(self, fitted: float, apart: float) -> float:
        """Seconds of a step with prompts, the factor aside, of which its decodes take `apart`."""
        return fitted + (self._contrast.times - 1) * max(fitted - apart, 0.0)

    def decodes(self, base: Floats | None, batch: Floats, context: Floats) -> Floats:
        """`seconds` of many decodes [...]; `base`: what the base says of each."""
        if base is not None:
            return self._factor * np.maximum(base + self._fit.decodes(batch, context), base / 4)
        if not self.observed:
            return np.full(batch.shape, self._factor * self._guess_s)
        learnt = self._fit.decodes(batch, context)
        return self._factor * np.maximum(learnt, max(self._mean / 16, 1e-6))

    def observe(self, step: Step, seconds: float) -> None:
        """Take in one step that ran."""
        if not seconds > 0:
            return
        if self.base is None:
            self._from_nothing(step, seconds)
        else:
            self._beside(self.base.seconds(step), step, seconds)

    def _note(self, fitted: float, seconds: float) -> float:
        """A step took so long where `fitted` was expected, the factor aside; how many times that
        is."""
        exact = abs(self._factor * fitted - seconds) < TICK  # a clock's sums are no other speed
        ratio = self._factor if exact else seconds / fitted
        self._ratios.add(ratio)
        return ratio

    # -- with a measured base ---------------------------------------------------------------------

    def _beside(self, base: float, step: Step, seconds: float) -> None:
        fitted = self._with(base, step)
        apart = self._apart(step) if step.prefills else fitted
        expected = self._contrasted(fitted, apart)
        ratio = self._note(expected, seconds)
        if step.prefills:
            self._contrast.prompt(ratio * expected / fitted, apart / fitted)
        else:
            self._contrast.decode(ratio)
        self.observed += 1
        self._block.append((step, base, fitted, apart, ratio * expected))
        if len(self._block) == BLOCK:
            self._learn()

    def _learn(self) -> None:
        """Take in a block of steps, each over what all of it took on average."""
        if self._fit.untaught and self._ratios.usual == self._factor == 1.0 and self._as_measured():
            self._fit.add_exact([(step, base) for step, base, *_ in self._block])
            self._block = []
            return
        steps, bases, fitted, apart, seconds = zip(*self._block, strict=True)
        self._block = []
        before = self._factor, self._fit.weights
        self._factor = self._ratios.usual
        expected = np.array(list(map(self._contrasted, fitted, apart)))
        mean = self._ratios.mean
        took = np.clip(np.array(seconds) / expected, mean / 2, mean * 2)
        sizes = np.array(bases)
        self._fit.add(steps, took / took.mean() * np.array(fitted) - sizes, sizes)
        self._fit.solve(TRUST / self._fit.steps, rising=False)
        self._fit.doubt()
        if before != (self._factor, self._fit.weights):
            self._lone.clear()
            self._beside_prompts = (0, 0.0), 0.0

    def _as_measured(self) -> bool:
        """Whether each step of the block took what its base says."""
        return all(base == fitted == took for _, base, fitted, _, took in self._block)

    # -- from nothing -----------------------------------------------------------------------------

    def _from_nothing(self, step: Step, seconds: float) -> None:
        if self.observed:
            fitted = self._fitted(step)
            self._errors.append(abs(self._factor * fitted / seconds - 1))
            self._note(fitted, seconds)
            if self._ratios.full:
                self._factor = min(max(self._ratios.median, 1 / DRIFT), DRIFT)
            if self.observed >= REFIT:
                seconds = min(seconds, 4 * fitted)
        self.observed += 1
        self._mean += (seconds - self._mean) / min(self.observed, MEMORY)
        self._fit.add([step], np.array([seconds]), np.ones(1))
        if self.observed <= REFIT or self.observed % REFIT == 0:
            self._fit.solve(1e-3, rising=True)
