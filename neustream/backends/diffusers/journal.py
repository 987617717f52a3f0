"""What a stock call has done so far, so that the same call elsewhere can be brought to the same place.

A stock call cannot be pickled in the middle. But it can be made again: with the results of its
encoders at hand, with zeros in place of what its denoiser said, and with the latents and the
scheduler of its latest step put in at that step. No model runs. That ends at the same place as long
as the call keeps nothing else from step to step.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from neustream.backends.diffusers.calls import Call
from neustream.backends.diffusers.results import Withheld, rebuilt
from neustream.errors import StageFailed

OWN = ("_neustream_", "_internal_dict")
"""Attributes of a request's scheduler that do not move: our own, and its config; and its `step`."""


FORWARD = frozenset(
    (
        "CogVideoXPipeline",
        "DDPMPipeline",
        "DiTPipeline",
        "FluxPipeline",
        "KandinskyV22Pipeline",
        "KandinskyV22PriorPipeline",
        "LTXPipeline",
        "PixArtAlphaPipeline",
        "QwenImagePipeline",
        "SanaPipeline",
        "StableAudioPipeline",
        "StableDiffusion3Pipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "WanPipeline",
    )
)
"""Pipelines whose calls keep nothing from step to step but their latents and their scheduler: each
is moved at each of its steps in a test, and ends with the same bits."""


def may_move(pipe: Any) -> bool:
    """Whether calls of a pipeline were shown to move; subclasses of a user's own were not."""
    cls = type(pipe)
    return cls.__name__ in FORWARD and cls.__module__.startswith("diffusers.")


@dataclass(slots=True)
class Made:
    """A call of a part that was made. `result`: what it gave, or its shape as tensors without data."""

    name: str
    kind: tuple[Any, ...]
    result: Any
    blank: bool = False


@dataclass(slots=True)
class Journal:
    """What a request's stock call did.

    Attributes:
        keeps: whether anything is noted at all.
        calls: of parts, in order.
        draws: the state of torch's own generators before the stretches, by number, in which the call
            drew from them in front of its first step. Stretch n comes before call n.
        began: states of the caller's generators at the start.
        result: of the latest scheduler step.
        scheduler: that took it.
        secret: why it cannot be brought to the same place elsewhere; empty: it can.
    """

    keeps: bool = True
    calls: list[Made] = field(default_factory=list)
    draws: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    began: list[torch.Tensor] = field(default_factory=list)
    result: Any = None
    scheduler: Any = None
    secret: str = ""
    _schedule: Any = None
    _pruned: bool = False
    _blanks: dict[Any, Any] = field(default_factory=dict)
    _once: dict[str, list[Made]] = field(default_factory=dict)

    def called(self, call: Call, result: Any, steps: int) -> Any:
        """A part gave `result`, after so many denoising steps; returns what the stock call gets.

        Of denoisers only the shapes of results are kept, but for those that are called in front of
        the first step only (a model that projects embeddings).
        """
        if not self.keeps or isinstance(result, BaseException):
            return result
        name, kind = call.part.name, call.kind
        if call.part.role != "denoise":
            result = watched(result)
            self.calls.append(Made(name, kind, result))
            return result
        if (name, kind) not in self._blanks:
            self._blanks[name, kind] = rebuilt(result, _blank, strict=False)
        if steps:
            self.prune()
            for made in self._once.pop(name, ()):
                made.result, made.blank = self._blanks[name, made.kind], True
            self.calls.append(Made(name, kind, self._blanks[name, kind], blank=True))
            return result
        made = Made(name, kind, result)
        self._once.setdefault(name, []).append(made)
        self.calls.append(made)
        return result

    def prune(self) -> None:
        """Let go of what the stock call did not look at: it is with its denoiser now."""
        if not self._pruned:
            self._pruned = True
            for made in self.calls:
                made.result = _kept(made.result, all=False)

    def made(self) -> list[Made]:
        """The calls so far, as they are to be made again."""
        if self._pruned:
            return self.calls
        return [replace(made, result=_kept(made.result, all=True)) for made in self.calls]

    def stepped(self, scheduler: Any, result: Any) -> None:
        """A scheduler took a step."""
        if not self.keeps:
            return
        if self.scheduler is None:
            self.scheduler, self._schedule = scheduler, scheduler.timesteps
        elif self.scheduler is not scheduler:
            self.secret = "its call steps with several schedulers"
        elif self._schedule is not scheduler.timesteps:
            self.secret = "its call goes through several schedules"
        self.result = result

    def goes_on(self, scheduler: Any) -> None:
        """The steps behind this one are taken by `scheduler`, whose state was put in."""
        self.scheduler, self._schedule = scheduler, scheduler.timesteps


class Watched(tuple[Any, ...]):
    """The layers of a result (hidden states), and which of them were `used`."""

    used: set[int]

    def __new__(cls, values: Iterable[Any]) -> Watched:
        made = super().__new__(cls, values)
        made.used = set()
        return made

    def __getitem__(self, index: Any) -> Any:
        self.used.update(np.atleast_1d(np.arange(len(self))[index]).tolist())
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        self.used.update(range(len(self)))
        return super().__iter__()

    def kept(self, *, all: bool) -> tuple[Any, ...]:
        """The layers that were used, or all; the others withheld."""
        layers = enumerate(super().__iter__())
        return tuple(x if all or at in self.used else Withheld(f"layer {at}") for at, x in layers)


def watched(result: Any) -> Any:
    """A model's result, with its layers watched."""
    if not isinstance(result, Mapping) or not any(isinstance(x, tuple) for x in result.values()):
        return result
    fields = {name: Watched(x) if isinstance(x, tuple) else x for name, x in result.items()}
    return type(result)(**fields)


def _kept(result: Any, *, all: bool) -> Any:
    """What is kept of a result: the layers that were used, or all, and no other objects."""
    if isinstance(result, Mapping):
        fields = {name: x.kept(all=all) if isinstance(x, Watched) else x for name, x in result.items()}
        result = type(result)(**fields)
    return rebuilt(result, lambda tensor: tensor, strict=False)


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


# -- schedulers -------------------------------------------------------------------------------------------


def state_of_scheduler(scheduler: Any) -> dict[str, Any]:
    """What a request's scheduler holds beside its config."""
    return {name: value for name, value in vars(scheduler).items() if name != "step" and not name.startswith(OWN)}


def put_in(state: dict[str, Any], scheduler: Any) -> None:
    """Give a scheduler the state of another one of its class. Tensors that are equal stay its own."""
    for name, value in state.items():
        own = scheduler.__dict__.get(name)
        alike = isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor)
        if not (alike and own.dtype == value.dtype and torch.equal(own, value)):
            scheduler.__dict__[name] = value
    for name in set(state_of_scheduler(scheduler)) - set(state):
        del scheduler.__dict__[name]


# -- as bytes ---------------------------------------------------------------------------------------------


class Raw(NamedTuple):
    """A tensor's bytes, as they lie in memory: kernels round by how their arguments lie.

    `where`: "cpu", "device" for the pipeline's own device, "meta" for a tensor without data.
    """

    data: np.ndarray
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    where: str


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Any values as bytes, with their tensors beside them."""

    pickled: bytes
    tensors: tuple[Raw, ...]


def packed(values: Any) -> Packed:
    """`values` as plain data; StageFailed for what cannot leave the process."""
    buffer = io.BytesIO()
    packer = _Packer(buffer)
    try:
        packer.dump(values)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise StageFailed(f"what it keeps cannot be pickled: {error}") from error
    return Packed(buffer.getvalue(), tuple(map(_raw, packer.tensors)))


def unpacked(given: Packed, device: torch.device) -> Any:
    """The values again, with the tensors of a device on `device`."""
    return _Unpacker(io.BytesIO(given.pickled), given.tensors, device).load()


def _raw(tensor: torch.Tensor) -> Raw:
    kind, dtype = tensor.device.type, str(tensor.dtype).removeprefix("torch.")
    if kind == "meta":
        return Raw(np.empty(0, np.uint8), dtype, tuple(tensor.shape), tensor.stride(), kind)
    dense = tensor.detach().cpu().clone()
    where = "cpu" if kind == "cpu" else "device"
    return Raw(_bytes(dense), dtype, tuple(dense.shape), dense.stride(), where)


def _bytes(dense: torch.Tensor) -> np.ndarray:
    """The memory of a tensor without holes, as uint8."""
    data: np.ndarray = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()
    return data


def _tensor(raw: Raw, device: torch.device) -> torch.Tensor:
    dtype = getattr(torch, raw.dtype)
    made = torch.empty_strided(raw.shape, raw.stride, dtype=dtype, device="meta" if raw.where == "meta" else "cpu")
    if raw.data.size:
        flat = made.as_strided((made.numel(),), (1,)).view(torch.uint8)
        flat.copy_(torch.frombuffer(bytearray(raw.data), dtype=torch.uint8))
    return made.to(device) if raw.where == "device" else made


class _Packer(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=5)
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, torch.nn.Module):
            raise pickle.PicklingError(f"a {type(value).__name__}")
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self._places:
            self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._places[id(value)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, tensors: Sequence[Raw], device: torch.device) -> None:
        super().__init__(buffer)
        self._raw = tensors
        self._device = device
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, place: Any) -> torch.Tensor:
        if place not in self._made:
            self._made[place] = _tensor(self._raw[place], self._device)
        return self._made[place]


def digest(call: Call) -> bytes:
    """What a call is given, bit for bit."""
    hashed = hashlib.blake2b(repr(call.kind).encode(), digest_size=16)
    for leaf in call.leaves:
        hashed.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
        hashed.update(_bytes(leaf.detach().cpu().clone(memory_format=torch.contiguous_format)).tobytes())
    return hashed.digest()


# -- random streams ---------------------------------------------------------------------------------------


def generators_of(named: Mapping[str, Any]) -> list[torch.Generator]:
    """The caller's generators among a call's arguments."""
    given = named.get("generator")
    return [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, torch.Generator)]


def noise_now(device: torch.device) -> list[torch.Tensor]:
    """The states of torch's own generators: the CPU's and that of `device`."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_noise(states: Sequence[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def same(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
