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
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from neustream.backends.diffusers.signatures import SIGNATURES

Tensors = Sequence[torch.Tensor]


class Coefficients:
    """One scalar for each row, for each scalar of a formula, as (B, 1, ...); used as stock uses its scalars.

    What torch makes of a tensor and a 0-dim tensor depends on where that is and on which side, when the
    tensor is in half precision. On the CPU, a scalar on the left is first rounded to the tensor's
    dtype, one on the right is not (the tests show it). On a GPU, a scalar that is there too is rounded; one
    on the host is not, and to divide by it is to multiply by its inverse (so say torch's kernels).
    """

    def __init__(self, scalars: Tensors, home: torch.device) -> None:
        self._scalars = scalars
        self._home = home

    def times(self, at: int, x: torch.Tensor) -> torch.Tensor:
        """A stock `scalar * x`."""
        scalar = self._scalars[at]
        return scalar.to(x.dtype) * x if x.device == self._home else (scalar * x).to(x.dtype)

    def under(self, at: int, x: torch.Tensor) -> torch.Tensor:
        """A stock `x / scalar`."""
        scalar = self._scalars[at]
        if x.device.type == "cpu":
            return (x / scalar).to(x.dtype)
        if x.device == self._home:
            return x / scalar.to(x.dtype)
        return (x * scalar.to(torch.promote_types(torch.float32, x.dtype)).reciprocal()).to(x.dtype)


Formula = Callable[[Coefficients, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


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
        output = self.output
        return self.table.name, self.table.rows.device, output.shape[1:], output.dtype, self.sample.dtype, output.device


def step_together(steps: Sequence[Step]) -> list[tuple[torch.Tensor, ...]]:
    """What each of `steps` (of one key) returns."""
    device, counts = steps[0].output.device, [step.output.shape[0] for step in steps]
    rows = [step.table.row(step.at, device) for step in steps]
    if max(counts) > 1:
        rows = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    output = torch.cat([step.output for step in steps])
    sample = torch.cat([step.sample for step in steps])
    scalars = torch.stack(rows).view(output.shape[0], -1, *[1] * (output.ndim - 1)).unbind(1)
    coefficients = Coefficients(scalars, steps[0].table.rows.device)
    values = steps[0].table.formula(coefficients, output, sample)
    return list(zip(*(value.split(counts) for value in values), strict=True))


@dataclass(frozen=True, eq=False)
class Hooks:
    """What a request's schedulers (and copies that its call makes of them) tell.

    `park` takes a step that can be shared, and returns what `step_together` gives, or None for the
    stock step to be taken; `stepped` is told of each new sample. `alone` says that there is nobody to
    share with. `known` gives the result of a step that was taken elsewhere, None for others; `taken` is
    told of each scheduler and its result.
    """

    park: Callable[[Step], Any]
    stepped: Callable[[torch.Tensor], None]
    alone: Callable[[], bool] = lambda: False
    known: Callable[[Any], Any] = lambda scheduler: None
    taken: Callable[[Any, Any], None] = lambda scheduler, result: None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        return self


class OwnStep:
    """The `step` of a request's own scheduler, whose class stays the stock one: stock calls ask for it."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = weakref.ref(scheduler)
        self.__signature__ = _signature(type(scheduler).step)  # pipelines look for eta there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scheduler: Any = self._scheduler()
        return _step(scheduler, type(scheduler).step, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnStep:
        """That of the copy which its scheduler is part of."""
        return OwnStep(memo.get(id(self._scheduler()), self._scheduler()))


@lru_cache(SIGNATURES)
def _signature(step: Callable[..., Any]) -> inspect.Signature:
    """Of a scheduler's step, without `self`."""
    signature = inspect.signature(step)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _step(
    self: Any, stock: Callable[..., Any], model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
) -> Any:
    """A stock scheduler's step, shared if it can be."""
    hooks: Hooks = self._neustream_hooks
    known = hooks.known(self)
    if known is not None:
        return known
    result = None if args or hooks.alone() else _shared(self, hooks, model_output, timestep, sample, kwargs)
    if result is None:
        result = stock(self, model_output, timestep, sample, *args, **kwargs)
    hooks.taken(self, result)
    hooks.stepped(result[0])
    return result


def _shared(scheduler: Any, hooks: Hooks, output: Any, timestep: Any, sample: Any, kwargs: Mapping[str, Any]) -> Any:
    """The result of a step that was shared; None: it could not be, or there was nobody to share it with."""
    if scheduler._neustream_timesteps is not scheduler.timesteps:
        scheduler._neustream_timesteps, scheduler._neustream_table = scheduler.timesteps, table_of(scheduler)
    table: Table | None = scheduler._neustream_table
    if table is None or not _plain(kwargs) or not _alike(output, sample):
        return None
    at = _index(scheduler, timestep)
    values = None if at is None else hooks.park(Step(table, at, output, sample))
    if at is None or values is None:
        return None
    if "_step_index" in scheduler.__dict__:
        scheduler._step_index = at + 1
    return table.result(*values) if kwargs.get("return_dict", True) else values


def is_stepped(value: Any) -> bool:
    """Whether a component keeps something from step to step that belongs to a request: a scheduler, a guider."""
    if isinstance(value, torch.nn.Module):
        return False
    return hasattr(value, "timesteps") or hasattr(value, "set_timesteps") or isinstance(value, BaseGuidance)


def stepped_of(pipe: Any) -> dict[str, Any]:
    """A pipeline's schedulers and guiders, by name."""
    return {name: value for name, value in vars(pipe).items() if is_stepped(value)}


def own_scheduler(shared: Any, hooks: Hooks) -> Any:
    """A copy of `shared` for one request."""
    scheduler = copy.deepcopy(shared)
    scheduler._neustream_hooks = hooks
    scheduler._neustream_timesteps = scheduler._neustream_table = None
    scheduler.step = OwnStep(scheduler)
    return scheduler


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


def _ddim(scheduler: Any) -> Table | None:
    config = scheduler.config
    if config.thresholding or config.clip_sample or config.prediction_type not in ("epsilon", "v_prediction"):
        return None
    steps = scheduler.timesteps.cpu()
    before = steps - config.num_train_timesteps // scheduler.num_inference_steps
    alphas, final = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    if alphas.device != final.device:  # add_noise moves the one and not the other
        return None
    before = before.to(alphas.device)
    alpha = alphas[steps]
    after = torch.where(before >= 0, alphas[before.clamp(min=0)], final)
    rows = torch.stack((alpha**0.5, (1 - alpha) ** 0.5, after**0.5, (1 - after) ** 0.5), dim=1)
    formula = _ddim_epsilon if config.prediction_type == "epsilon" else _ddim_velocity
    return Table(f"ddim {config.prediction_type}", rows, formula, DDIMSchedulerOutput)


def _ddim_epsilon(c: Coefficients, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    original = c.under(0, sample - c.times(1, output))
    return c.times(2, original) + c.times(3, output), original


def _ddim_velocity(c: Coefficients, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    original = c.times(0, sample) - c.times(1, output)
    epsilon = c.times(0, output) + c.times(1, sample)
    return c.times(2, original) + c.times(3, epsilon), original


def _euler(scheduler: Any) -> Table | None:
    if scheduler.config.prediction_type != "epsilon":
        return None
    sigmas = scheduler.sigmas
    rows = torch.stack((sigmas[:-1], sigmas[1:] - sigmas[:-1]), dim=1)
    return Table("euler", rows, _euler_epsilon, EulerDiscreteSchedulerOutput)


def _euler_epsilon(c: Coefficients, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    sample = sample.to(torch.float32)
    original = sample - c.times(0, output)
    derivative = c.under(0, sample - original)
    return (sample + c.times(1, derivative)).to(output.dtype), original


def _flow_match_euler(scheduler: Any) -> Table | None:
    sigmas = scheduler.sigmas
    if scheduler.config.stochastic_sampling:
        return None
    rows = (sigmas[1:] - sigmas[:-1])[:, None]
    return Table("flow match euler", rows, _flow_match, FlowMatchEulerDiscreteSchedulerOutput)


def _flow_match(c: Coefficients, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((sample.to(torch.float32) + c.times(0, output)).to(output.dtype),)


MAKERS: Mapping[str, Callable[[Any], Table | None]] = {
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _flow_match_euler,
}
