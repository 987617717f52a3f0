"""A plan played by a command: with a bar, and ended by Ctrl-C with what there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from neustream.bench.looking import models_of, named
from neustream.bench.plan import Plan, Target
from neustream.bench.runs import Run
from neustream.commands.bench_options import ServerOptions
from neustream.commands.interrupts import Interrupts
from neustream.commands.printing import new_progress, note
from neustream.errors import ConfigError
from neustream.workload.asks import Ask
from neustream.workload.texts import Texts


class CountingTexts:
    """Makes a counter of tokens by a tokenizer, in whatever process needs one."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def __call__(self) -> Callable[[str], int]:
        return self._texts.count


def target_of(server: ServerOptions, asks: Sequence[Ask], wait_s: float) -> Target:
    """Whom to ask; the server is waited for, and asked for models of the right kinds where none is named.

    Raises:
        ConfigError: the backend makes images alone, and texts are asked for.
        BackendError: the server is not there, or has no model.
    """
    target = server.target()
    kinds = {ask.image is not None for ask in asks}
    if target.api == "images" and False in kinds:
        raise ConfigError("--backend openai-images: texts are asked for; needs --dataset-name images")
    if target.model and not wait_s:
        return target
    found = {images: models_of(target, wait_s, images=images) for images in kinds}
    if target.model:
        return target
    names = {images: named(target, models) for images, models in found.items()}
    return replace(target, model=names.get(False, names.get(True, "")), image_model=names.get(True, ""))


def play(plan: Plan, target: Target, texts: Texts, workers: int = 1, keep: bool = False) -> Run:
    """Play it; the first Ctrl-C ends it early, with what there is."""
    from neustream.bench.load import Load, Options  # needs an extra

    counting = CountingTexts(texts) if texts.exact else None
    with new_progress() as progress, Interrupts() as interrupts:
        task = progress.add_task(plan.name, total=len(plan.asks) if workers == 1 else None)
        load = Load(plan, target, Options(workers, counting, keep), lambda record: progress.advance(task))
        name = "" if plan.arrivals.startswith(plan.name) else f"{plan.name}: "
        note(progress, f"{name}{len(plan.asks)} requests to {target.url}, {plan.arrivals}")
        interrupts.watch(load)
        return load.run()
