"""Diffusion requests served by a bare loop, as one writes it by hand, and by the forwards of such a loop alone."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence

import torch
from diffusion_models import Model, Rows
from diffusion_ways import Ask, Image

from neustream.backends.torch import sync


class _Open:
    """A request on its way through the bare loop."""

    def __init__(self, model: Model, ask: Ask, rows: Rows) -> None:
        self.guidance = ask.guidance
        self.rows = rows
        self.count = 2 if ask.guided else 1
        self.scheduler = copy.deepcopy(model.pipe.scheduler)
        self.scheduler.set_timesteps(ask.steps, device=model.pipe.device)
        self.times = self.scheduler.timesteps
        self.latents = model.noise(ask.generator) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.at = 0

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        latents, now = self.latents, self.times[self.at]
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, now)
        return latents.expand(self.count, -1, -1, -1), now.expand(self.count)

    def step(self, out: torch.Tensor) -> None:
        if self.count == 2:
            out = out[:1] + self.guidance * (out[1:] - out[:1])
        self.latents = self.scheduler.step(out, self.times[self.at], self.latents, return_dict=False)[0]
        self.at += 1


def opened(model: Model, asks: Sequence[Ask]) -> list[_Open]:
    """`asks` at their first step; their prompts are encoded together."""
    rows: dict[Ask, Rows] = {}
    for guided in (False, True):
        if some := [ask for ask in asks if ask.guided == guided]:
            rows.update(zip(some, model.rows([ask.seed for ask in some], guided), strict=True))
    return [_Open(model, ask, rows[ask]) for ask in asks]


def gathered(some: Sequence[_Open]) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    latents, times = zip(*(one.inputs() for one in some), strict=True)
    rows = {name: torch.cat([one.rows[name] for one in some]) for name in some[0].rows}
    return torch.cat(latents), torch.cat(times), rows


def bare_loop(model: Model, asks: Sequence[Ask], most: int, counts: list[int] | None = None) -> list[Image]:
    """A batched loop as one writes it by hand: all requests step together, each by its own scheduler.

    One forward of the denoiser per round, for up to `most` requests; who is done is decoded together, and the next
    take their places. `counts` is told the rows of each forward.
    """
    with torch.no_grad():
        order = opened(model, asks)
        waiting, active, images = deque(order), list[_Open](), dict[_Open, Image]()
        while waiting or active:
            while waiting and len(active) < most:
                active.append(waiting.popleft())
            out = model.forward(*gathered(active))
            if counts is not None:
                counts.append(len(out))
            for one, rows in zip(active, out.split([one.count for one in active]), strict=True):
                one.step(rows)
            over = [one for one in active if one.at == len(one.times)]
            active = [one for one in active if one.at < len(one.times)]
            if over:
                images.update(zip(over, model.decode(torch.cat([one.latents for one in over])), strict=True))
    return [images[one] for one in order]


def forwards_alone(model: Model, asks: Sequence[Ask], counts: Sequence[int]) -> Callable[[], list[Image]]:
    """The forwards of a loop, by their row counts, and nothing else: what no way of serving can be faster than."""
    with torch.no_grad():
        latents, times, rows = gathered(opened(model, asks))

    def run() -> list[Image]:
        with torch.no_grad():
            for count in counts:
                model.forward(latents[:count], times[:count], {name: x[:count] for name, x in rows.items()})
        sync(model.pipe.device)
        return []

    return run
