"""Calls of a pipeline's parts, parked by several requests and carried out together.

A `Call` is what a stock pipeline wanted to run: `unet(sample, t, encoder_hidden_states=...)`. Calls
with equal keys differ in their rows only and can be one call (`joining`).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from neustream.backends.diffusers.adapters import kept, scaled, scales_of
from neustream.backends.diffusers.autocast import autocast, autocast_now
from neustream.backends.diffusers.foreign import has_own_parts, is_attention_torchs, is_stock, is_usual, processors_of
from neustream.backends.diffusers.joining import Joining, Leaves
from neustream.backends.diffusers.results import Unshareable, close, rows_of
from neustream.backends.torch import OUT_OF_MEMORY
from neustream.errors import StageFailed, told

log = logging.getLogger("neustream")

Role = Literal["encode", "denoise", "decode"]
UNUSED = {("AutoencoderKL", "generator")}
"""Arguments that a method takes and ignores: different ones do not keep calls apart."""
PROVEN = {
    "AutoencoderKL",
    "AutoencoderKLWan",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CogVideoXTransformer3DModel",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "T5EncoderModel",
    "UMT5EncoderModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "WanTransformer3DModel",
}
"""Models whose rows do not influence each other, as the tests show; others are tried when first batched."""


class Part:
    """Something of a pipeline that requests can share a call of: a model, or one of its methods.

    Args:
        name: as the pipeline calls it ("unet", "vae.decode").
        role: which kind of stage its calls belong to.
        function: what is called.
        owner: the class name of the model.
        model: whose function it is.
        signature: the function whose parameters positional arguments are matched with.
        buckets: row counts that batches are padded to (by repeating row 0); none: no padding.
        max_rows: the most rows in one call.
        reused: whether a result's memory is used again by the next call (CUDA graphs).
    """

    def __init__(
        self,
        name: str,
        role: Role,
        function: Callable[..., Any],
        owner: str,
        *,
        model: Any = None,
        signature: Callable[..., Any] | None = None,
        buckets: Sequence[int] = (),
        max_rows: int | None = None,
        reused: bool = False,
    ) -> None:
        self.name = name
        self.role = role
        self.owner = owner
        self.whose: Any = None
        """Whose own model it is of; None: everybody's."""
        self.function = function
        self.buckets = tuple(sorted(buckets))
        self.max_rows = max_rows
        self.reused = reused
        self.model = model
        self.place: torch.device | None = None
        """Where its pipeline runs, if the model's weights are not here."""
        self.dtype: torch.dtype | None = getattr(model, "dtype", None)
        self.casts = bool(getattr(getattr(model, "config", None), "force_upcast", False))
        """Whether stock calls cast the model and cast it back."""
        processors = processors_of(model) if isinstance(model, torch.nn.Module) else set()
        own = isinstance(model, torch.nn.Module) and has_own_parts(model)
        usual = all(map(is_usual, processors)) and is_attention_torchs()
        self.usual = owner in PROVEN and not own and usual
        """Whether its rows are known to be apart."""
        self.foreign = own or not all(map(is_stock, processors)) or not is_attention_torchs()
        """Whether modules or attention processors of somebody's own may mix them in any way."""
        self.scales: list[dict[str, float]] = scales_of(model)
        self.scaling = False
        """Whether a call is under way that scales its adapters."""
        self.limits: dict[Any, int] = {}
        """The most rows that memory allowed, by key; learnt."""
        self._parameters = [
            name
            for name, parameter in inspect.signature(signature or function).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY)
        ]
        self._rows_apart: dict[Any, bool] = {}
        """Whether calls of a key can be one, as far as that was tried; by their rows too if it is `foreign`."""

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any], cast: torch.dtype | None = None) -> Call:
        names = self._parameters
        if len(args) > len(names):  # a wrapper's `*args` hides the names
            names = [f"*{at}" for at in range(len(args))]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        for key in list(named):
            if (self.owner, key) in UNUSED:
                named[key] = None
        return Call(self, args, kwargs, named, cast)

    def of(self, model: Any, method: str, whose: Any) -> Part:
        """The same part of a copy of its model, which is `whose`."""
        part = copy.copy(self)
        part.function, part.model, part.whose = getattr(model, method) if method else model, model, whose
        part.scales = scales_of(model)
        return part

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """The results of calls with one key, in order; an exception in place of a result fails that call alone."""
        key, results = calls[0].key, list[Any]()
        for some in self._chunks(calls, self.most(key)):
            results += self._run(key, some)
        return results

    def most(self, key: Any) -> int | None:
        """The most rows that calls of `key` may have together."""
        limits = [limit for limit in (self.max_rows, self.limits.get(key)) if limit is not None]
        return min(limits, default=None)

    @staticmethod
    def _chunks(calls: Sequence[Call], most: int | None) -> Iterator[list[Call]]:
        chunk: list[Call] = []
        rows = 0
        for call in calls:
            if chunk and most is not None and rows + call.rows > most:
                yield chunk
                chunk, rows = [], 0
            chunk.append(call)
            rows += call.rows
        yield chunk

    def _run(self, key: Any, calls: list[Call]) -> list[Any]:
        shared = len(calls) > 1 or self._bucket(calls[0].rows) > calls[0].rows
        if shared and self._rows_apart.get(key) is False:
            return [result for call in calls for result in self._tried(key, [call], self._alone)]
        if shared and not self._rows_apart.get(self._trial(key, calls), self.usual):
            return self._prove(key, calls)
        try:
            return self._tried(key, calls, self._together if shared else self._alone)
        except Unshareable as error:
            self._keep_apart(key, str(error))
            return self._run(key, calls)

    def _trial(self, key: Any, calls: Sequence[Call]) -> Any:
        """What a trial of calls tells about: all of a key; of so many rows each, if it is `foreign`."""
        return (key, tuple(call.rows for call in calls)) if self.foreign else key

    def _tried(self, key: Any, calls: list[Call], run: Callable[[list[Call]], list[Any]]) -> list[Any]:
        """The results of `run`; where that fails, of smaller batches, down to who is to blame."""
        try:
            self._settle(calls[0])
            return run(calls)
        except Unshareable:
            raise
        except OUT_OF_MEMORY as error:
            if len(calls) == 1:
                return [StageFailed(f"{self.name}: out of memory with {calls[0].rows} row(s): {error}")]
            half = len(calls) // 2
            self.limits[key] = max(call.rows for call in calls) * half
            log.warning(
                "%s: out of memory with %d rows; from now on at most %d such rows run together",
                self.name,
                sum(call.rows for call in calls),
                self.limits[key],
            )
        except Exception as error:  # noqa: BLE001  a model may raise anything
            if len(calls) == 1:
                return [error.with_traceback(None)]
            half = 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._run(key, calls[:half]) + self._run(key, calls[half:])

    def _settle(self, call: Call) -> None:
        """Have the model in the dtype that the call was made for."""
        wanted = call.cast or self.dtype
        if self.casts and wanted is not None and self.model.dtype != wanted:
            self.model.to(dtype=wanted)

    def _bucket(self, rows: int) -> int:
        return next((size for size in self.buckets if size >= rows), rows)

    def _alone(self, calls: list[Call]) -> list[Any]:
        """The result of one call as it was made."""
        (call,) = calls
        with autocast(call.autocast), torch.set_grad_enabled(call.grad), self._scales_kept(call):
            result = self.function(*call.args, **call.kwargs)
        return [rows_of(result, 0, call.rows, call.rows, self.name, copy=True) if self.reused else result]

    def _together(self, calls: list[Call]) -> list[Any]:
        rows = sum(call.rows for call in calls)
        bucket = self._bucket(rows)
        joining = Joining([call.leaves for call in calls], calls[0].rows, bucket - rows)
        named = joining.named(calls[0].named)
        args = [named.pop(name) for name in list(named) if name.startswith("*")]
        with autocast(calls[0].autocast), self._scales_kept(calls[0]):
            whole = self.function(*args, **named)
        # what outlives this step must not keep the whole batch's memory
        keep = self.reused or self.role != "denoise"
        results, at = [], 0
        for call in calls:
            results.append(rows_of(whole, at, at + call.rows, bucket, self.name, copy=keep))
            at += call.rows
        return results

    def _prove(self, key: Any, calls: list[Call]) -> list[Any]:
        """Calls that nobody has tried together: some are made alone, then all, and compared.

        The last, which those in front of it may influence; all of them if it is `foreign`.
        """
        tried = calls if self.foreign else calls[-1:]
        alone = {id(call): self._tried(key, [call], self._alone)[0] for call in tried}
        if not any(isinstance(result, BaseException) for result in alone.values()):  # says nothing of batches
            try:
                self._settle(calls[0])
                together = self._together(calls)
                pairs = zip(calls, together, strict=True)
                if all(close(alone[id(call)], result) for call, result in pairs if id(call) in alone):
                    self._rows_apart[self._trial(key, calls)] = True
                    return together
                self._keep_apart(key, "its results differ")
            except OUT_OF_MEMORY:
                log.warning("%s: out of memory with %d rows", self.name, sum(call.rows for call in calls))
            except Exception as error:  # noqa: BLE001  a model may raise anything
                self._keep_apart(key, told(error))
        return [alone[id(call)] if id(call) in alone else self._tried(key, [call], self._alone)[0] for call in calls]

    def _keep_apart(self, key: Any, why: str) -> None:
        self._rows_apart[key] = False
        log.warning("%s (%s) is served one request at a time, without padding: %s", self.name, self.owner, why)

    @contextlib.contextmanager
    def _scales_kept(self, call: Call) -> Iterator[None]:
        """Have the adapters as they are once a call is over that scales them, whatever it did."""
        if not self.scales or not scaled(call.named):
            yield
            return
        self.scaling = True
        try:
            with kept(self.scales):
                yield
        finally:
            self.scaling = False


class Call:
    """One parked call. `rows` is the length of its first tensor's dimension 0, `key` what batches share.

    `cast` is the dtype that its request has cast the model to, `autocast` torch's where it was made, `grad`
    whether gradients are wanted of it.
    """

    __slots__ = ("args", "autocast", "cast", "grad", "key", "kwargs", "leaves", "named", "part", "rows")

    def __init__(
        self,
        part: Part,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        named: Mapping[str, Any],
        cast: torch.dtype | None,
    ) -> None:
        self.part = part
        self.args = args
        self.kwargs = kwargs
        self.named = named
        self.rows = next((x.shape[0] for x in named.values() if isinstance(x, torch.Tensor) and x.ndim), 1)
        self.cast = cast
        self.autocast = autocast_now()
        self.grad = torch.is_grad_enabled()
        kinds: list[Any] = [part.name, cast, self.autocast]
        if part.whose is not None or self.grad:  # graphs of gradients are of one request
            kinds.append(("whose", "object", id(self if part.whose is None else part.whose)))
        found = Leaves(named, self.rows)
        self.leaves = found.tensors
        self.key = (*kinds, *found.kinds)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Its rows, and the key without what its arguments hold: as for this call in another process."""
        return self.rows, *map(_without_content, self.key)

    @property
    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        """What costs depend on beside the number of rows: the shape of a row of its first tensor, and its dtype."""
        first = next(leaf for leaf in self.leaves if leaf.ndim)
        return tuple(first.shape[1:]), first.dtype


def _without_content(entry: Any) -> Any:
    hidden = isinstance(entry, tuple) and len(entry) == 3 and entry[1] in ("same", "object")
    return entry[:2] if hidden else entry
