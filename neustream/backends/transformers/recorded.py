"""Packed calls by a model's own operations, without the Python that stands between them.

torch's tracer takes down what such a call computes, once, when the model is served. A step then runs
these operations one after the other outside of Python's lock, which is free for the engine meanwhile.
Attention stays a call of ours: it differs with the rows (`packed.py`).

Taken down are models whose code is the stock library's, for which the tracer has no doubt, and whose
logits are the stock call's to the last bit in trials of several sizes. Others compute as ever.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from neustream.backends.torch import OUT_OF_MEMORY
from neustream.backends.transformers.lent import own_forward
from neustream.backends.transformers.packed import Packed, packing
from neustream.backends.transformers.proof import affordable, as_it_was
from neustream.backends.transformers.slots import Row, Slots
from neustream.errors import told

if TYPE_CHECKING:
    from neustream.backends.transformers.layers import SlotLayer
    from neustream.backends.transformers.model import LanguageModel

PASSES = (
    "_jit_pass_erase_shape_information",
    "_jit_pass_constant_pooling",
    "_jit_pass_cse",
    "_jit_pass_peephole",
    "_jit_pass_cse",
    "_jit_pass_dce",
)
"""What torch does with what was taken down: sizes of the example are forgotten, and what is computed twice, mostly
sizes again, is computed once."""
SHOWN = 3
"""Decodes of the call that is taken down."""
TRIED = (1, 2, 3, 5, 8)
"""Decodes of the calls in which it is compared with the stock one."""
LONG = 520
"""Tokens of a prompt with which it is compared, if so many are affordable: code may go by pieces of a fixed size."""
TURNS = 2
"""How often, with other tokens and positions."""
STOCK = ("torch", "transformers")
"""Packages whose code has no effects but its results."""
READ = ("dropout", "scaling", "is_causal", "softcap", "output_attentions")
"""What stock attention reads of all that it is given beside tensors."""


class NotRecorded(Exception):
    """A model's calls are not taken down, and why."""


class _Site(NamedTuple):
    """One attention of the model: whose keys and values, by which module, how."""

    layer: SlotLayer
    module: torch.nn.Module
    how: Mapping[str, Any]


class _Taken(NamedTuple):
    """What was taken down, and the attentions in it."""

    function: Callable[..., torch.Tensor]
    sites: Sequence[_Site]


class _Here(threading.local):
    call: Packed | None = None
    sites: Sequence[_Site] = ()
    error: BaseException | None = None


_here = _Here()


class Recorded:
    """A language model's packed calls, as torch's tracer took them down: of decodes, and with prompts.

    Raises:
        NotRecorded: this model's cannot be, and why.
    """

    def __init__(self, model: LanguageModel) -> None:
        _check(model)
        weights = _Weights(model)
        self._weights, self._tables = weights.given, tables_of(model.model)
        with as_it_was(model.model):
            self._decodes = self._taken_down(model, weights, _decodes(model, SHOWN, 0))
            self._prompts = self._taken_down(model, weights, _mixed(model, 0))
            self._try(model)
        for slot in range(min(max(TRIED), model.slots)):
            model.cache.scrub(slot)

    def takes(self, rows: Sequence[Row]) -> bool:
        """Whether rows are without a look at an image, and tables are those that were there."""
        same = all(some.get(key) is table for some, key, table in self._tables)
        return same and all(row.sight is None for row in rows)

    def __call__(self, call: Packed) -> torch.Tensor:
        """The logits behind each row's last token, float32 [rows, vocabulary].

        What fails in it fails as in a call of the model.
        """
        decodes = call.wanted is None
        taken = self._decodes if decodes else self._prompts
        given = (call.ids, call.positions) if decodes else (call.ids, call.positions, call.wanted)
        _here.call, _here.sites = call, taken.sites
        try:
            with torch.jit.optimized_execution(False):  # as they were taken down
                logits: torch.Tensor = taken.function(*given, *self._weights)
        except RuntimeError as error:  # torch makes this of all others too
            raise _here.error or RuntimeError(_reason(error)) from None
        finally:
            _here.call, _here.sites, _here.error = None, (), None
        return logits.float()

    def _taken_down(self, model: LanguageModel, weights: _Weights, rows: Sequence[Row]) -> _Taken:
        call, sites, cache = model.packed(rows), list[_Site](), model.cache
        assert isinstance(cache, Slots)
        recording = _Recording(call, sites)
        function = partial(_logits, model, weights, call.wanted is not None)
        given = [call.ids, call.positions, *weights.examples]
        if call.wanted is not None:
            given.insert(2, call.wanted)
        cache.select(recording)
        _here.call, _here.sites = call, sites
        try:
            with ExitStack() as using, warnings.catch_warnings(record=True) as doubts:
                warnings.simplefilter("always")
                using.enter_context(packing(model.config, recording))
                if model.prepacked is not None:
                    using.enter_context(model.prepacked.used())
                found = _traced(function, given, sites)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # whatever code does that was not made for this
            raise NotRecorded(f"torch's tracer failed: {told(error)}") from error
        finally:
            _here.call, _here.sites = None, ()
        for doubt in doubts:
            _check_doubt(doubt)
        if len(sites) != len(cache.layers):
            raise NotRecorded(f"{len(sites)} attentions for {len(cache.layers)} layers")
        return _Taken(found, sites)

    def _try(self, model: LanguageModel) -> None:
        """NotRecorded if logits are not those of the stock call."""
        turns = range(1, TURNS + 1)
        decodes = [_decodes(model, count, turn) for turn in turns for count in TRIED]
        for rows in [*decodes, *[_mixed(model, turn) for turn in turns], _long(model)]:
            wanted = model.stock_forward(rows)
            if not torch.equal(self._tried(model.packed(rows)), wanted):
                raise NotRecorded(f"logits of {len(rows)} rows are others than those of the stock call")

    def _tried(self, call: Packed) -> torch.Tensor:
        """NotRecorded if what was taken down does not go on with another call."""
        try:
            return self(call)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # as where what was taken down has sizes of its own
            raise NotRecorded(f"a call of another size failed: {told(error)}") from error


class _Weights:
    """All tensors that a model computes with.

    They are arguments of what is taken down, and no constants, so that nothing keeps them but the model.

    Attributes:
        given: what it is called with; examples: what stands for them while it is taken down.
    """

    def __init__(self, model: LanguageModel) -> None:
        named = {id(weight): weight for _, _, weight in places_of(model.model)}
        self._ids = tuple(named)
        self.given = [weight.detach() for weight in named.values()]
        self.examples = list(self.given)
        if model.prepacked is not None:
            for plain, copy in model.prepacked.pairs():
                self.examples.append(plain)
                self.given.append(copy)

    @contextmanager
    def shown(self, model: LanguageModel, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        """A model with others in the place of its own."""
        count, before = len(self._ids), places_of(model.model)
        named = dict(zip(self._ids, weights[:count], strict=True))
        for some, key, weight in before:
            some[key] = named[id(weight)]
        try:
            with nullcontext() if model.prepacked is None else model.prepacked.shown(weights[count:]):
                yield
        finally:
            for some, key, weight in before:
                some[key] = weight


def _traced(
    function: Callable[..., torch.Tensor], given: Sequence[torch.Tensor], sites: Sequence[_Site]
) -> Callable[..., torch.Tensor]:
    """A function as torch's tracer takes it down, in a unit of its own, which ends with it.

    `torch.jit.trace` puts all that it takes down into one unit, which keeps it as long as the process is there.
    What it takes down more than once is computed once: that leaves out operations, and changes no result.
    NotRecorded if one of the attentions, whose `sites` come about meanwhile, is not among them.
    """
    graph, _ = torch._C._create_graph_by_tracing(function, tuple(given), lambda value: "", True, False)
    for name in PASSES:
        getattr(torch._C, name)(graph)
    attentions = sum([node.kind() == "neustream::attend" for node in graph.nodes()])
    if attentions != len(sites):
        raise NotRecorded(f"of {len(sites)} attentions {len(sites) - attentions} are asked for nothing")
    found: Callable[..., torch.Tensor] = torch._C._create_function_from_graph("taken_down", graph)
    return found


def _logits(
    model: LanguageModel, own: _Weights, choose: bool, ids: torch.Tensor, positions: torch.Tensor, *given: torch.Tensor
) -> torch.Tensor:
    """What is taken down: logits by ids and positions [1, tokens], places to `choose`, and all weights."""
    wanted, weights = (given[0], given[1:]) if choose else (None, given)
    asked = {"input_ids": ids, "position_ids": positions, "use_cache": True, model.cache_name: model.cache}
    with own.shown(model, weights):
        logits: torch.Tensor = model.model(**asked, **model.only(wanted)).logits[0]
    return logits if wanted is None or model.keeps else logits[wanted]


def places_of(model: torch.nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Where a model has its weights and tables: each with its dict and key there."""
    kept = [some for module in model.modules() for some in (module._parameters, module._buffers)]
    return [(some, key, weight) for some in kept for key, weight in some.items() if weight is not None]


def tables_of(model: torch.nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor | None]]:
    """A model's buffers that are not saved, as angles are: somebody may put others there, which count then."""
    named = [(module._buffers, key) for module in model.modules() for key in module._non_persistent_buffers_set]
    return [(some, key, some.get(key)) for some, key in named]


class _Recording(Packed):
    """Stands for a packed call while the model's is taken down: its attention becomes one operation."""

    def __init__(self, call: Packed, sites: list[_Site]) -> None:
        super().__init__(call.rows, call.device, 0, call.context)
        self._sites = sites

    def update(self, layer: SlotLayer, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._layer = layer
        return keys, values

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any
    ) -> tuple[torch.Tensor, None]:
        layer, self._layer = self._layer, None
        read = {name: how[name] for name in READ if name in how}
        if layer is None or how.get("position_bias") is not None:
            raise NotRecorded("attention without keys of its own, or with a bias by position")
        if any(isinstance(value, torch.Tensor) for value in read.values()):
            raise NotRecorded(f"attention is given tensors as one of {', '.join(read)}")
        self._sites.append(_Site(layer, module, read))
        return torch.ops.neustream.attend(query, key, value, len(self._sites) - 1), None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: int) -> torch.Tensor:
    """Attention number `at` of the call that runs in this thread."""
    call, site = _here.call, _here.sites[at]
    assert call is not None
    try:
        call.update(site.layer, key, value)
        return call.attend(site.module, query, key, value, **site.how)[0]
    except BaseException as error:
        _here.error = error
        raise


def _reason(error: RuntimeError) -> str:
    """What torch says, without where that stands in what was taken down."""
    return str(error).rpartition("RuntimeError: ")[2].strip()


_OPERATIONS = torch.library.Library("neustream", "DEF")
_OPERATIONS.define("attend(Tensor query, Tensor key, Tensor value, int at) -> Tensor")
_OPERATIONS.impl("attend", _attend, "CPU")


def _check(model: LanguageModel) -> None:
    """NotRecorded for models that are not tried."""
    if model.device.type != "cpu":
        raise NotRecorded(f"it is on {model.device}, where this was not tried")
    if not model.packs:
        raise NotRecorded("its rows are not computed as one lane")
    if model.adapters is not None:
        raise NotRecorded("its layers have adapters")
    check_modules(model.model)


def check_modules(model: torch.nn.Module) -> None:
    """NotRecorded if modules have code that is not the stock library's: it may have effects."""
    for name, module in model.named_modules():
        _check_module(name or "the model", module)


def _check_module(name: str, module: torch.nn.Module) -> None:
    kind = type(module)
    for code in (kind, kind.forward):
        if _from(code) not in STOCK:
            raise NotRecorded(f"{name} has code of its own ({kind.__module__}.{kind.__name__})")
    own = module.__dict__
    for key, code in own.items():
        if isinstance(code, FunctionType | MethodType) and _from(code) not in STOCK:
            raise NotRecorded(f"{name} has code of its own ({key})")
    if own_forward(own) is not None or own.get("_compiled_call_impl") is not None:
        raise NotRecorded(f"{name} has a forward of its own")


def _from(code: object) -> str:
    """The package that a class or function is of."""
    return str(getattr(code, "__module__", "")).partition(".")[0]


def _check_doubt(doubt: warnings.WarningMessage) -> None:
    """NotRecorded if the model's code asked for a value: it may do something else with another one.

    What torch's own functions ask for are sizes, to check their arguments; but for `value in tensor`.
    """
    own = Path(doubt.filename).is_relative_to(Path(torch.__file__).parent)
    value = Path(doubt.filename).name == "_tensor.py" and "Python integer" not in str(doubt.message)
    if issubclass(doubt.category, torch.jit.TracerWarning) and (value or not own):
        where = f"{Path(doubt.filename).name}, line {doubt.lineno}"
        raise NotRecorded(f"torch's tracer says of {where}: {str(doubt.message).partition('. ')[0]}")


def _decodes(model: LanguageModel, count: int, turn: int) -> list[Row]:
    """Decodes of up to so many texts, the last of them at the last position."""
    count, last = min(count, model.slots), model.max_len - 1
    starts = [(at * 37 + turn * 11) % model.max_len for at in range(count - 1)] + [last]
    return [Row(slot, start, _tokens(model, slot + turn, 1)) for slot, start in enumerate(starts)]


def _mixed(model: LanguageModel, turn: int) -> list[Row]:
    """A prompt, and where there are slots a part of one and a decode."""
    first, part = 5 + turn, 3 + turn
    most = model.max_len - 1
    rows = [Row(0, 0, _tokens(model, turn, min(first, most)))]
    if model.slots > 2 and most > part + first:
        rows.append(Row(1, first, _tokens(model, turn + 1, part)))
        rows.append(Row(2, part, _tokens(model, turn + 2, 1)))
    return rows


def _long(model: LanguageModel) -> list[Row]:
    """A long prompt."""
    assert isinstance(model.cache, Slots)
    most = affordable(model.model, model.max_len, len(model.cache.layers))
    return [Row(0, 0, _tokens(model, 0, min(LONG, most)))]


def _tokens(model: LanguageModel, first: int, count: int) -> list[int]:
    most = min(model.known, model.vocabulary)
    return [(first * 5 + at * 3 + 1) % most for at in range(count)]
