"""The tensors in the arguments of calls: taken apart, and joined with those of other calls.

Tensors with a row per sample are concatenated along dimension 0, timesteps become one per row, and
everything else is the same in all calls that can be joined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

TIMESTEPS = {"timestep", "timesteps", "t"}
"""Parameters that hold one number per row, or one for all rows."""
SHARED = {"img_ids", "txt_ids", "image_rotary_emb", "freqs_cis", "rotary_emb"}
"""Parameters that describe positions, the same for every row, whatever their first dimension is."""


class Leaves:
    """The tensors of one call, in order.

    Args:
        named: its arguments; rows: how many rows it has.

    Attributes:
        tensors: with timesteps as one per row.
        kinds: what calls have in common that can be joined: all but what is in their rows.
    """

    def __init__(self, named: Mapping[str, Any], rows: int) -> None:
        self.tensors: list[torch.Tensor] = []
        self.kinds: list[Any] = []
        self._rows = rows
        for name, value in named.items():
            self._add(name, value, name in SHARED)

    def _add(self, name: str, value: Any, shared: bool) -> None:
        if _is_time(name, value):
            self._add_time(name, value)
        elif isinstance(value, torch.Tensor):
            self._add_tensor(name, value, shared)
        elif isinstance(value, Mapping):
            self.kinds.append((name, "dict", tuple(value)))
            for key, inner in value.items():
                self._add(key, inner, shared or key in SHARED)
        elif isinstance(value, list | tuple):
            self.kinds.append((name, type(value), len(value)))
            for inner in value:
                self._add("", inner, shared)
        elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
            self.kinds.append((name, type(value), value))
        else:
            self.kinds.append((name, "object", id(value)))

    def _add_time(self, name: str, value: Any) -> None:
        self.kinds.append((name, "time"))
        times = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        whole = times.ndim and times.shape[0] == self._rows
        self.tensors.append(times if whole else times.expand(self._rows))

    def _add_tensor(self, name: str, value: torch.Tensor, shared: bool) -> None:
        if _has_rows(value, shared, self._rows):
            self.kinds.append((name, "rows", value.shape[1:], value.dtype))
        else:
            self.kinds.append((name, "same", _digest(value)))
        self.tensors.append(value)


class Joining:
    """Makes the arguments of one call for several.

    Args:
        tensors: of each call, as of `Leaves`; rows: of the first one.
        spare: how often its first row is repeated at the end.
    """

    def __init__(self, tensors: Sequence[Sequence[torch.Tensor]], rows: int, spare: int) -> None:
        self._columns = zip(*tensors, strict=True)
        self._rows = rows
        self._spare = spare
        self._device = next((leaf.device for leaf in tensors[0] if leaf.ndim), None)

    def named(self, first: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments for all, from those of the first call."""
        return {name: self._value(name, value, name in SHARED) for name, value in first.items()}

    def _value(self, name: str, value: Any, shared: bool) -> Any:
        if _is_time(name, value):
            return self._cat(_promoted(list(next(self._columns)), self._device))
        if isinstance(value, torch.Tensor):
            column = list(next(self._columns))
            return self._cat(column) if _has_rows(column[0], shared, self._rows) else column[0]
        if isinstance(value, Mapping):
            return {key: self._value(key, x, shared or key in SHARED) for key, x in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._value("", inner, shared) for inner in value)
        return value

    def _cat(self, leaves: list[torch.Tensor]) -> torch.Tensor:
        if self._spare:
            first = leaves[0]
            leaves.append(first[:1].expand(self._spare, *first.shape[1:]))
        return torch.cat(leaves)


def _is_time(name: str, value: Any) -> bool:
    """Whether an argument holds one timestep per row, or one for all."""
    if name not in TIMESTEPS:
        return False
    if isinstance(value, torch.Tensor):
        return bool(value.ndim < 2)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_rows(tensor: torch.Tensor, shared: bool, rows: int) -> bool:
    """Whether a tensor has a row per sample."""
    return not shared and tensor.ndim > 0 and tensor.shape[0] == rows


def _digest(tensor: torch.Tensor) -> bytes:
    """What a tensor that all rows share holds; kept with it, so that it is read from the device once."""
    known: tuple[int, bytes] | None = getattr(tensor, "_neustream_digest", None)
    version = 0 if tensor.is_inference() else tensor._version  # of how often it was written to
    if known is None or known[0] != version:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{tuple(tensor.shape)}{tensor.dtype}".encode()
        known = (version, hashlib.blake2b(head + flat.tobytes(), digest_size=16).digest())
        tensor._neustream_digest = known
    return known[1]


def _promoted(times: list[torch.Tensor], device: torch.device | None) -> list[torch.Tensor]:
    """Timesteps in one dtype on one device (schedulers count in int64 or float32, on the host or not)."""
    dtype = times[0].dtype
    for other in times[1:]:
        if other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    return [x if x.dtype == dtype and x.device == device else x.to(device, dtype) for x in times]
