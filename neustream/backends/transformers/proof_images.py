"""Shows, on the model itself, that prompts with images get in company what the stock model makes of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from neustream.backends.transformers.proof import CLOSE, CLOSE_HALF, apart, as_it_was
from neustream.backends.transformers.sight import Sight
from neustream.backends.transformers.slots import Row
from neustream.errors import BackendError, NeustreamError, StageFailed, told

if TYPE_CHECKING:
    from neustream.backends.transformers.eyes import Eyes
    from neustream.backends.transformers.images import Reader
    from neustream.backends.transformers.model import LanguageModel

SIDES = (336, 168, 84, 28)
"""Pixels of the pictures' sides, the first with which prompts fit the model."""
OUTPUTS = 3
"""Outputs of a trial: those behind the first are decodes."""
PART = 5
"""Tokens of a prompt's part in a trial, about."""


def sample_picture(seed: int, width: int = SIDES[0], height: int = SIDES[0]) -> Image.Image:
    """A picture of noise."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(256, size=(height, width, 3), dtype=np.uint8))


@dataclass(frozen=True)
class _Case:
    """A prompt with images, and what stock `generate` makes of it: outputs, and the logits of each."""

    ids: list[int]
    sight: Sight
    outputs: list[int]
    logits: list[torch.Tensor]


@torch.inference_mode()
def prove_images(model: LanguageModel, eyes: Eyes, reader: Reader) -> None:
    """Try prompts with images; BackendError if one does not get what stock `generate` makes of it alone.

    One image, and two of different sizes: looked at together, one prompt prefilled in parts and the
    other beside a text without images, then decoded in company.
    """
    try:
        with as_it_was(model.model):
            cases = _cases(model, reader)
            sights = []
            for case, seen in zip(cases, eyes.look([case.sight for case in cases]), strict=True):
                if isinstance(seen, StageFailed):
                    raise seen
                sights.append(case.sight.with_(seen))
            _compare(model, cases, sights)
    except NeustreamError as error:
        raise _refused(model, str(error)) from error
    except Exception as error:  # whatever a model does that was not made for this
        raise _refused(model, told(error)) from error
    finally:
        for slot in range(min(3, model.slots)):
            model.cache.scrub(slot)


def _refused(model: LanguageModel, why: str) -> BackendError:
    return BackendError(
        f"{model.name} cannot be served with images: {why}; for texts only, give the tokenizer in place of the "
        "processor"
    )


def _cases(model: LanguageModel, reader: Reader) -> list[_Case]:
    """Prompts with one and with two pictures, as large as all fit the model; else those with one alone."""
    shortest = 0
    fit: list[_Case] = []
    for side in SIDES:
        mark = reader.marker
        asked = [
            (f"{mark}1 2", [sample_picture(1, side, side)]),
            (f"3 {mark}4 5{mark}6", [sample_picture(2, side, side * 2 // 3), sample_picture(3, side, side)]),
        ]
        made = [reader.process(text, images) for text, images in asked]
        lengths = [len(reader.made(one)[0]) for one in made]
        if max(lengths) + OUTPUTS <= model.max_len:
            return [_case(model, reader, one) for one in made]
        shortest = lengths[0]
        fit = [_case(model, reader, made[0])] if shortest + OUTPUTS <= model.max_len else []
    if not fit:
        raise BackendError(f"a prompt with a small image has {shortest} tokens, and max_len is {model.max_len}")
    return fit


def _case(model: LanguageModel, reader: Reader, made: Mapping[str, Any]) -> _Case:
    ids, sight = reader.made(made)
    how = {"max_new_tokens": OUTPUTS, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    config = GenerationConfig(**how, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    inputs = {name: torch.as_tensor(value).to(model.device) for name, value in made.items()}
    out: Any = model.model.generate(**inputs, generation_config=config)
    outputs = out.sequences[0, len(ids) :].tolist()
    return _Case(ids, sight, outputs, [logits[0].float() for logits in out.logits])


def _compare(model: LanguageModel, cases: list[_Case], sights: list[Sight]) -> None:
    """The prompts on slots of their own, beside a text; BackendError if their logits are others."""
    both = list(zip(cases, sights, strict=True))[: model.slots]
    beside = [Row(2, 0, [1, 2, 3])] if model.slots > 2 else []
    first, sight = both[0]
    _check(model, model.forward([Row(0, 0, first.ids, sight), *beside])[0], first.logits[0])
    for case, sight in both[1:]:
        start, count = 0, len(case.ids)
        while start < count:
            end = next((end for at in range(start + PART, count) if (end := sight.floor(at)) > start), count)
            got = model.forward([Row(1, start, case.ids[start:end], sight)])[0]
            start = end
        _check(model, got, case.logits[0])
    for at in range(1, min(len(case.logits) for case, _ in both)):
        rows = [
            Row(slot, len(case.ids) + at - 1, case.outputs[at - 1 : at], sight)
            for slot, (case, sight) in enumerate(both)
        ]
        for got, (case, _) in zip(model.forward(rows), both, strict=True):
            _check(model, got, case.logits[at])


def _check(model: LanguageModel, got: torch.Tensor, alone: torch.Tensor) -> None:
    off = apart(got, alone)
    if not off <= CLOSE.get(model.model.dtype, CLOSE_HALF):
        raise BackendError(f"behind a prompt with images its logits differ from those of generate by {off:.1e}")
