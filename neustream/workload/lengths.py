"""Lengths drawn at random, as the load generators of the field draw theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["fixed", "normal", "skew_normal", "lognormal", "lognormal above min", "uniform", "poisson"]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """A distribution of whole numbers, usually of tokens.

    What is drawn outside of `least` and `most` is moved to these; a fixed length is `mean`.
    `lognormal above min` has the mean and deviation of what is above `least`.
    """

    kind: Kind
    mean: float
    std: float = 0.0
    least: int = 0
    most: int = 2**31
    skew: float = 0.0

    @classmethod
    def fixed(cls, length: float) -> Lengths:
        """Always the same."""
        whole = int(length)
        return cls("fixed", whole, 0.0, whole, whole)

    @classmethod
    def between(cls, least: int, most: int) -> Lengths:
        """Each whole number from `least` to `most` equally often."""
        if least == most:
            return cls.fixed(least)
        return cls("uniform", (least + most) / 2, (most - least) / math.sqrt(12), least, most)

    @classmethod
    def around(cls, length: int, ratio: float, least: int = 1) -> Lengths:
        """From `length * (1 - ratio)` to `length * (1 + ratio)`, each as often, as vLLM draws."""
        low = max(least, math.floor(length * (1 - ratio)))
        return cls.between(low, max(low, math.ceil(length * (1 + ratio))))

    def draw(self, rng: np.random.Generator, number: int) -> Integers:
        """`number` lengths, shape (number,)."""
        if self.kind == "fixed":
            return np.full(number, int(self.mean), dtype=np.int64)
        if self.kind == "uniform":
            return rng.integers(self.least, self.most, size=number, endpoint=True)
        drawn = np.clip(self._samples(rng, number), self.least, self.most)
        return np.rint(drawn).astype(np.int64)

    def _samples(self, rng: np.random.Generator, number: int) -> Floats:
        if self.kind == "skew_normal":
            return self._skewed(rng, number)
        if self.kind == "lognormal":
            return self._lognormal(rng, number, self.mean)
        if self.kind == "lognormal above min":
            above = self.mean - self.least
            return self.least + self._lognormal(rng, number, above if above > 0 else 1.0)
        if self.kind == "poisson":
            counts = rng.poisson(max(self.mean, 0.0) or 1.0, number)
            return np.asarray(counts, dtype=np.float64)
        return rng.normal(self.mean, self.std, number)

    def _lognormal(self, rng: np.random.Generator, number: int, mean: float) -> Floats:
        if self.std <= 0 or mean <= 0:
            return np.full(number, mean)
        variance = math.log1p((self.std / mean) ** 2)
        return rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), number)

    def _skewed(self, rng: np.random.Generator, number: int) -> Floats:
        delta = self.skew / math.sqrt(1 + self.skew**2)
        first, second = rng.standard_normal((2, number))
        mixed = delta * first + math.sqrt(1 - delta**2) * second
        return np.asarray(self.mean + self.std * np.where(first >= 0, mixed, -mixed))

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{int(self.mean)}"
        if self.kind == "uniform":
            return f"{self.least} to {self.most}, uniform"
        bounds = f", {self.least} to {self.most}" if self.most < 2**31 else ""
        return f"{self.kind} {self.mean:g} ± {self.std:g}{bounds}"
