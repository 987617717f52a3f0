"""A request's own scheduler, and one call for the scheduler steps of several requests.

diffusers' scheduler objects keep private state from step to step, so requests cannot share one; each
gets a copy of the pipeline's. A stock step is a handful of operations with a few scalars. For
schedulers without memory and noise the scalars of all timesteps make a table with a row per step;
requests at different steps, of different step counts, then share the operations, with one
coefficient per row in place of each scalar. The order of operations is the stock one, and every
intermediate result is rounded to the dtype that it has there, so results are equal bit for bit.
Schedulers that keep past outputs or draw noise take their steps one by one, by their own `step`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

Tensors = Sequence[torch.Tensor]
Formula = Callable[[Tensors, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


class Table:
    """The scalars of one request's steps, and the operations that use them.

    Args:
        name: of the formula; steps of one name can share operations.
        rows: (steps, scalars), float32.
        formula: (coefficients of shape (B, 1, ...), model output, sample) -> what the stock step returns.
        result: the class that the stock step returns it in, if no tuple is wanted.
    """

    def __init__(self, name: str, rows: torch.Tensor, formula: Formula, result: Callable[..., Any]) -> None:
        self.name = name
        self.formula = formula
        self.result = result
        self.rows = rows
        self._by_device: dict[torch.device, Tensors] = {}

    def row(self, at: int, device: torch.device) -> torch.Tensor:
        if device not in self._by_device:
            self._by_device[device] = self.rows.to(device).unbind(0)
        return self._by_device[device][at]


@dataclass(slots=True, eq=False)
class Step:
    """A scheduler step that waits for others to share operations with."""

    table: Table
    at: int
    output: torch.Tensor
    sample: torch.Tensor

    @property
    def key(self) -> tuple[Any, ...]:
        return self.table.name, self.output.shape[1:], self.output.dtype, self.sample.dtype, self.output.device


def step_together(steps: Sequence[Step]) -> list[tuple[torch.Tensor, ...]]:
    """What each of `steps` (of one key) returns."""
    device, counts = steps[0].output.device, [step.output.shape[0] for step in steps]
    rows = [step.table.row(step.at, device) for step in steps]
    if max(counts) > 1:
        rows = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    output = torch.cat([step.output for step in steps])
    sample = torch.cat([step.sample for step in steps])
    coefficients = torch.stack(rows).view(output.shape[0], -1, *[1] * (output.ndim - 1)).unbind(1)
    values = steps[0].table.formula(coefficients, output, sample)
    return list(zip(*(value.split(counts) for value in values), strict=True))


def own_scheduler(shared: Any, park: Callable[[Step], Any], stepped: Callable[[torch.Tensor], None]) -> Any:
    """A copy of `shared` for one request.

    Its steps that can be shared go to `park`, which returns what `step_together` gives, or None for the
    stock step to be taken; `stepped` is told of each new sample.
    """
    scheduler = copy.deepcopy(shared)
    stock = scheduler.step
    table: Table | None = None
    of: Any = None  # the timesteps that the table is for

    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal table, of
        if of is not scheduler.timesteps:
            of, table = scheduler.timesteps, table_of(scheduler)
        result = None
        if table is not None and not args and _plain(kwargs) and _alike(model_output, sample):
            at = _index(scheduler, timestep)
            if at is not None and (values := park(Step(table, at, model_output, sample))) is not None:
                if "_step_index" in scheduler.__dict__:
                    scheduler._step_index = at + 1
                result = table.result(*values) if kwargs.get("return_dict", True) else values
        if result is None:
            result = stock(model_output, timestep, sample, *args, **kwargs)
        stepped(result[0])
        return result

    step.__signature__ = _signature(scheduler.__class__)  # type: ignore[attr-defined]  # pipelines look for eta there
    scheduler.step = step
    return scheduler


@cache
def _signature(scheduler: Any) -> inspect.Signature:
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    return inspect.Signature(parameters[1:])


def _plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether these arguments of a step leave it without noise; a generator is not used then."""
    return all(name in ("return_dict", "generator") or (name == "eta" and value == 0) for name, value in kwargs.items())


def _alike(output: Any, sample: Any) -> bool:
    return (
        isinstance(output, torch.Tensor)
        and isinstance(sample, torch.Tensor)
        and output.shape == sample.shape
        and output.ndim > 0
        and output.is_floating_point()
        and output.device == sample.device
    )


def _index(scheduler: Any, timestep: Any) -> int | None:
    """Which of its steps a scheduler is at; None if that cannot be told."""
    if "_step_index" in scheduler.__dict__:
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        return int(scheduler.step_index)
    steps: torch.Tensor = scheduler.timesteps
    if isinstance(timestep, torch.Tensor) and timestep.dtype == steps.dtype and timestep.device == steps.device:
        # the loop's timestep is a view of the schedule: its place tells, without reading the device
        at, rest = divmod(timestep.data_ptr() - steps.data_ptr(), steps.element_size())
        if not rest and 0 <= at < len(steps):
            return int(at)
    found = (steps == timestep).nonzero()
    return int(found[0]) if len(found) else None


# -- the formulas -----------------------------------------------------------------------------------------


def table_of(scheduler: Any) -> Table | None:
    """The table of a scheduler whose timesteps are set; None if its steps cannot be shared."""
    make = MAKERS.get(type(scheduler).__name__)
    return None if make is None else make(scheduler)


def _times(coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A stock `scalar * x`: computed at the higher precision, rounded to that of `x`."""
    return (coefficient * x).to(x.dtype)


def _over(x: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    return (x / coefficient).to(x.dtype)


def _ddim(scheduler: Any) -> Table | None:
    config = scheduler.config
    if config.thresholding or config.clip_sample or config.prediction_type not in ("epsilon", "v_prediction"):
        return None
    steps = scheduler.timesteps.cpu()
    before = steps - config.num_train_timesteps // scheduler.num_inference_steps
    alphas, final = scheduler.alphas_cumprod.cpu(), scheduler.final_alpha_cumprod.cpu()
    alpha = alphas[steps]
    after = torch.where(before >= 0, alphas[before.clamp(min=0)], final)
    rows = torch.stack((alpha**0.5, (1 - alpha) ** 0.5, after**0.5, (1 - after) ** 0.5), dim=1)
    formula = _ddim_epsilon if config.prediction_type == "epsilon" else _ddim_velocity
    return Table(f"ddim {config.prediction_type}", rows, formula, DDIMSchedulerOutput)


def _ddim_epsilon(c: Tensors, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    original = _over(sample - _times(c[1], output), c[0])
    return _times(c[2], original) + _times(c[3], output), original


def _ddim_velocity(c: Tensors, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    original = _times(c[0], sample) - _times(c[1], output)
    epsilon = _times(c[0], output) + _times(c[1], sample)
    return _times(c[2], original) + _times(c[3], epsilon), original


def _euler(scheduler: Any) -> Table | None:
    if scheduler.config.prediction_type != "epsilon":
        return None
    sigmas = scheduler.sigmas.cpu()
    rows = torch.stack((sigmas[:-1], sigmas[1:] - sigmas[:-1]), dim=1)
    return Table("euler", rows, _euler_epsilon, EulerDiscreteSchedulerOutput)


def _euler_epsilon(c: Tensors, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    sample = sample.to(torch.float32)
    original = sample - _times(c[0], output)
    derivative = _over(sample - original, c[0])
    return (sample + _times(c[1], derivative)).to(output.dtype), original


def _flow_match_euler(scheduler: Any) -> Table | None:
    if scheduler.config.stochastic_sampling:
        return None
    sigmas = scheduler.sigmas.cpu()
    rows = (sigmas[1:] - sigmas[:-1])[:, None]
    return Table("flow match euler", rows, _flow_match, FlowMatchEulerDiscreteSchedulerOutput)


def _flow_match(c: Tensors, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((sample.to(torch.float32) + _times(c[0], output)).to(output.dtype),)


MAKERS: Mapping[str, Callable[[Any], Table | None]] = {
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _flow_match_euler,
}
