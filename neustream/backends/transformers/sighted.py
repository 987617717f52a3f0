"""A language model and its eyes, if it has any: how prompts are read, and the stage that looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neustream.backends.transformers.eyes import Eyes, eyes_of
from neustream.backends.transformers.images import Reader, is_processor
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.proof_images import prove_images, sample_picture
from neustream.backends.transformers.see import See, measure_see, see_stage
from neustream.backends.transformers.text import Ask
from neustream.core.batch import StepInput
from neustream.core.graph import Stage
from neustream.core.profile import LatencyProfile
from neustream.errors import BackendError, RequestError
from neustream.graphs import SEE_BATCH
from neustream.profiling.files import Measurement
from neustream.profiling.measuring import default_batches
from neustream.service.mount import Instance


class Sighted:
    """One device's model, with its reader and the eyes behind it.

    `sample`: a prompt with an image of usual size; None: it takes no images.
    """

    def __init__(self, model: LanguageModel, eyes: Eyes | None, reader: Reader, sample: Ask | None) -> None:
        self.model, self.eyes, self.reader, self.sample = model, eyes, reader, sample

    def stage(self, node: str, max_batch: int) -> Stage:
        """The stage that looks; its profile counts images like that of the sample as 1."""
        assert self.sample is not None and self.sample.sight is not None
        return see_stage(node, min(max_batch, SEE_BATCH), self.sample.sight.count)

    def instance(
        self,
        stage: Stage,
        ask: Callable[[StepInput], Ask],
        profile: Callable[[See, Stage, Ask], LatencyProfile],
    ) -> Instance:
        """Its module, and its profile."""
        assert self.eyes is not None and self.sample is not None
        see = See(self.model, self.eyes, ask, name=stage.name.removesuffix(".see"))
        return Instance({stage.name: see}, {stage.name: profile(see, stage, self.sample)})


def sighted_of(model: LanguageModel, processor: Any, *, proven: bool) -> Sighted:
    """A model with what it sees by; BackendError if its processor is not its own, or images are not exact.

    `proven`: whether it was tried before, and is as it was then.
    """
    eyes = eyes_of(model.model)
    if not is_processor(processor):
        return Sighted(model, eyes, Reader(model, eyes, processor), None)
    if eyes is None:
        raise BackendError(f"{model.name} has no eyes: give its tokenizer in place of {type(processor).__name__}")
    if model.fixed is not None and eyes.blocks:
        raise BackendError(
            f"{model.name} computes the tokens of an image together, and buckets compute prompts in blocks: "
            "give no buckets, or the tokenizer in place of the processor"
        )
    reader = Reader(model, eyes, processor)
    try:
        ids, sight = reader.read(reader.marker + "1 2", [sample_picture(0)])
    except RequestError as error:
        raise BackendError(f"{type(processor).__name__} is no processor for {model.name}: {error}") from error
    if not proven:
        prove_images(model, eyes, reader)
    return Sighted(model, eyes, reader, Ask(ids, sight=sight))


def measured_see(model: LanguageModel, processor: Any, max_batch: int) -> list[Measurement]:
    """Time the tower of a model over batches of requests with an image each; while nobody is served."""
    sighted = sighted_of(model, processor, proven=True)
    if sighted.sample is None or sighted.eyes is None:
        raise BackendError(f"{model.name} has no eyes, so its prompts have no images")
    stage = sighted.stage("llm", max_batch)
    see = See(model, sighted.eyes, lambda given: given.params["ask"], name="llm")
    return measure_see(see, stage, sighted.sample, default_batches(stage.max_batch))
