"""How long a model's steps take: measured on the model itself, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from neustream.backends.torch import OUT_OF_MEMORY
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.modules import Texts
from neustream.backends.transformers.replayed import USES
from neustream.backends.transformers.text import Ask, Text
from neustream.core.batch import StepInput
from neustream.core.steps import Step, StepLatency
from neustream.engine.clock import stopwatch
from neustream.errors import ProfileError, StageFailed
from neustream.profiling.files import STATISTIC
from neustream.profiling.measuring import default_batches, versions
from neustream.profiling.steps import StepsFile, Timed, load_steps, save_steps, steps_file, steps_of

REPEATS = 15
SPREAD = 4
"""Requests of a decode have contexts from 1 - 1/SPREAD to 1 + 1/SPREAD times the mean."""

Cell = tuple[tuple[int, ...], tuple[int, ...]]
"""One kind of step: tokens of each prompt in prefill, and the context of each decode."""


def cells_of(slots: int, length: int) -> list[Cell]:
    """The steps that are measured for a model with `slots` of `length` tokens.

    Single prompts from 1 token to all, doubling; some steps of several prompts; decodes on a grid of
    batch and context; prompts beside decodes.
    """
    part = max(2, length // 4)
    parts = sorted({min(16, part), part})
    cells: list[Cell] = [((tokens,), ()) for tokens in _below(length - 1, [1, *(2**k for k in range(3, 32))])]
    for count in (2, 4, 8):
        if count <= slots:
            cells += [((tokens,) * count, ()) for tokens in parts]
    contexts = _below(length, [4**k for k in range(2, 16)])
    for batch in default_batches(slots):
        cells += [((), _around(context, batch, length)) for context in contexts]
    beside = sorted({1, slots // 2, slots - 1} - {0}) if slots > 1 else []
    for batch in beside:
        cells += [((tokens,), _around(part, batch, length)) for tokens in sorted({*parts, length // 2})]
    return list(dict.fromkeys(cells))


def _below(most: int, sizes: Sequence[int]) -> list[int]:
    """Those of `sizes` that are less than `most`, and it."""
    return [*(size for size in sizes if size < most), most]


def _around(context: int, batch: int, length: int) -> tuple[int, ...]:
    """Contexts of a decode with that mean: real batches have some of each."""
    most = min(context // SPREAD, length - context)
    pairs = batch // 2
    offs = [round(most * (k + 1) / pairs) for k in range(pairs)]
    return tuple([context + off for off in offs] + [context] * (batch % 2) + [context - off for off in offs])


def measure_steps(
    model: LanguageModel,
    *,
    seconds: float = 30.0,
    cells: Sequence[Cell] | None = None,
    tick: Callable[[str, int, float], None] = lambda stage, batch, seconds: None,
) -> list[Timed]:
    """Time real steps of `model` in about `seconds`; call it while nothing is served by it.

    Each round times every cell once, so that a moment in which the device is slow falls on all; the
    first is not counted. There are `REPEATS` rounds, or fewer, at least one, where time runs out.
    What does not fit the device's memory is left out.
    """
    bench = _Bench(model)
    wanted = list(cells or cells_of(model.slots, model.reach))
    took: dict[Cell, list[float]] = {cell: [] for cell in wanted}
    began = stopwatch()
    for turn in range(REPEATS + 1):
        round_began = stopwatch()
        for cell in list(took):
            try:
                lasted = bench.time(cell) if turn else bench.first(cell)
            except OUT_OF_MEMORY:
                del took[cell]
                continue
            finally:
                bench.clear()
            if turn:
                took[cell].append(lasted)
            tick("prefill" if cell[0] else "decode", len(cell[0]) + len(cell[1]), lasted)
        now = stopwatch()
        if turn and now - began + (now - round_began) > seconds:
            break
    if not took:
        raise ProfileError(f"no step of {model.name} fits the memory of {model.place}")
    return [(_step(cell), lasted) for cell, lasted in took.items()]


def _step(cell: Cell) -> Step:
    prompts, contexts = cell
    return Step(len(prompts), sum(prompts), sum(n * n for n in prompts), len(contexts), sum(contexts))


class _Bench:
    """Synthetic requests: their slots are marked as filled without a prefill, so that decodes can be timed."""

    def __init__(self, model: LanguageModel) -> None:
        self._texts = Texts(model, lambda given: Ask([0]), name="llm", splits=False)
        self._ids: list[str] = []

    def time(self, cell: Cell) -> float:
        prompts, contexts = cell
        inputs = [self._input(self._texts.prefill, n) for n in prompts]
        inputs += [self._input(self._texts.decode, n) for n in contexts]
        began = stopwatch()
        results = self._texts.step(inputs)  # ends with tokens on the CPU: the device is idle then
        lasted = stopwatch() - began
        for result in results:
            if isinstance(result, StageFailed):
                raise result
        return lasted

    def first(self, cell: Cell) -> float:
        """The first steps of a cell: a graph that is captured by its use is there from then on."""
        if self._texts.model.replayed is not None:
            for _ in range(USES - 1):
                self.time(cell)
                self.clear()
        return self.time(cell)

    def _input(self, stage: str, tokens: int) -> StepInput:
        id = f"sample-{len(self._ids)}"
        self._ids.append(id)
        if stage == self._texts.decode:
            self._texts.pretend(id, tokens - 1)
        state = {"llm": Text(Ask([0] * tokens))}
        return StepInput(id, {}, state, stage, size=float(tokens), whole=float(tokens))

    def clear(self) -> None:
        for id in self._ids:
            self._texts.release(id)
        self._ids = []


def file_of(model: LanguageModel, timed: Sequence[Timed], how: str, *, beside: bool = False) -> StepsFile:
    """What was measured, as a profile file with its origin. `beside`: see `usual`."""
    weights = sum(weight.numel() for weight in model.model.parameters())
    repeats = min(len(seconds) for _, seconds in timed)
    origin = {
        "how": how,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "slots": model.slots,
        "max_len": model.max_len,
        "prepack": model.prepacked is not None,
        "recorded": model.recorded is not None,
        "graphs": model.replayed is not None,
        "versions": versions(),
        "repeats": repeats,
        "statistic": STATISTIC[beside],
    }
    name = f"{model.name}, {weights / 1e6:.1f} M parameters"
    return steps_file(timed, model=name, device=model.place, origin=origin, beside=beside)


def steps_for(
    model: LanguageModel,
    cache: Path | str | None,
    seconds: float,
    tick: Callable[[str, int, float], None] = lambda stage, batch, seconds: None,
) -> StepLatency:
    """The step profile of a model from the cache (default: the user's); what is not there is measured and kept."""
    path = Path(cache or user_cache_path("neustream")) / "profiles" / fingerprint(model) / "steps.json"
    if path.exists():
        return load_steps(path)
    timed = measure_steps(model, seconds=seconds, tick=tick)
    file = file_of(model, timed, "measured when served", beside=True)
    save_steps(file, path)
    return steps_of(file)


def fingerprint(model: LanguageModel) -> str:
    """A name for all that latencies depend on: architecture, dtype, the device, versions, slots."""
    facts: Mapping[str, Any] = {
        "model": model.name,
        "config": model.model.config.to_dict(),
        "attention": "eager" if model.eager else "sdpa",
        "prepack": model.prepacked is not None,
        "recorded": model.recorded is not None,
        "graphs": model.replayed is not None,
        "dtype": str(model.model.dtype),
        "place": model.place,
        "slots": [model.slots, model.max_len],
        "way": [str(model.way), model.way.parts, bool(model.way.why)],
        "buckets": None if model.fixed is None else model.fixed.contexts,
        "versions": versions(),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"{model.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
