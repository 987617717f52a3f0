"""What a language model's linear layers alone allow, beside decodes of the whole model.

    OMP_NUM_THREADS=1 python benchmarks/text_layers.py [--model small] [--rounds 30]

Medians in milliseconds of the layers as the stock library has them, of those in oneDNN's layout, and of whole steps;
and tokens per second if a step were that and nothing else. The last column has what a prompt of 71 tokens takes in
these layers for each 55 outputs too, which requests of `text.py` have in the mean.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from arguments import at_least_one
from rich.console import Console
from served_texts import WARM, micros
from text_models import MODELS, made

from neustream.analysis.tables import new_table
from neustream.backends.transformers import LanguageModel
from neustream.backends.transformers.slots import Row

AT_ONCE = (1, 8, 16, 32)
"""Decodes of a step of `linear`."""
PROMPT, OUTPUTS = 71, 55
"""Tokens of a request of `text.py`, in the mean."""


def linear(args: argparse.Namespace) -> None:
    """One table."""
    torch.set_num_threads(1)
    model = made(args.model)
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    served = LanguageModel(model, slots=max(AT_ONCE), max_len=256)
    columns = ["stock layers", "laid out", "whole step", "laid out, with prompts"]
    table = new_table(f"{args.model}: ms, and tokens/s", "decodes", columns)
    prompt = _layers_alone(served, layers, [PROMPT if layer is not layers[-1] else 1 for layer in layers], args.rounds)[
        1
    ]
    for rows in AT_ONCE:
        medians = list(_layers_alone(served, layers, [rows] * len(layers), args.rounds))
        decodes = [Row(slot, 64, [slot + 4]) for slot in range(rows)]
        medians.append(_median(lambda decodes=decodes: served.forward(decodes), args.rounds))  # type: ignore[misc]
        with_prompts = OUTPUTS / (OUTPUTS * medians[1] / rows + prompt)
        cells = [f"{median * 1e3:.1f}, {rows / median:.0f}" for median in medians]
        table.add_row(str(rows), *cells, f"{with_prompts:.0f}")
    Console().print(table)


def _layers_alone(served: LanguageModel, layers: list[Any], rows: list[int], rounds: int) -> tuple[float, float]:
    """Seconds of linear layers with so many rows each: as the stock library has them, and as they are laid out."""
    inputs = [torch.randn(count, layer.in_features) for count, layer in zip(rows, layers, strict=True)]
    stock = _median(lambda: _each(layers, inputs), rounds)
    with served.prepacked.used() if served.prepacked else contextlib.nullcontext():
        return stock, _median(lambda: _each(layers, inputs), rounds)


def _median(work: Callable[[], object], rounds: int) -> float:
    for _ in range(WARM):
        work()
    return micros(work, rounds) / 1e6


def _each(layers: list[Any], inputs: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        for layer, given in zip(layers, inputs, strict=True):
            layer(given)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--rounds", type=at_least_one, default=30)
    linear(parser.parse_args())


if __name__ == "__main__":
    main()
