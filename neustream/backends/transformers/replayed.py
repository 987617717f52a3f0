"""Decodes as CUDA graphs: a step's kernels are launched at once, without the Python that stands between them.

A graph computes with tensors that stay where they are. So there is one for each number of lanes and
of keys, by powers of two: lane i has the text in slot i, and attention reads that slot as it lies, up
to so many keys. Those of the most lanes or the most keys are captured, and compared with the model's
own calls, when it is served; the others once they are used, in place of a larger one. Short prompts
are graphs too, by their number of tokens. Everything else is a call of the model as ever.

Where slots come to have more tokens than there is storage for, that is made anew, elsewhere: graphs are
captured again, the largest at once and the others once they are used.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING
from weakref import proxy

import torch

from neustream.backends.capturing import CAPTURES, Capture, NotCaptured
from neustream.backends.torch import without_cudnn_attention
from neustream.backends.transformers.packed import ALIGNED, packing
from neustream.backends.transformers.proof import CLOSE, CLOSE_HALF, apart, as_it_was
from neustream.backends.transformers.recorded import NotRecorded, check_modules, places_of, tables_of
from neustream.backends.transformers.slots import Row, Slots
from neustream.backends.transformers.still import Decodes, NotReplayed, Prompt
from neustream.engine.clock import stopwatch
from neustream.errors import BackendError, told

if TYPE_CHECKING:
    from neustream.backends.transformers.model import LanguageModel

SHORTEST = 64
"""Keys of the graphs that read the fewest."""
PROMPTS = (16, 32, 64, 128, 256)
"""Tokens of prompts that are graphs: longer ones take as long whoever launches their kernels."""
TOGETHER = 2
"""Prompts of a step that are replayed one after the other, at most: each reads all weights, one call for more once."""
USES = 2
"""A graph that is not there yet is captured at its second use: the first one is a replay of a larger one."""
log = logging.getLogger("neustream")


def spare_tokens(device: torch.device, graphs: bool | None) -> int:
    """Tokens that slots have beside those of texts: lanes without a text write there; 0: there are to be no graphs.

    BackendError: there can be none on this device, and `graphs` asks for them.
    """
    able = device.type in CAPTURES
    if graphs and not able:
        raise BackendError(f"graphs=True, but the model is on {device}: CUDA graphs are for CUDA devices; leave it out")
    return ALIGNED if able and graphs is not False else 0


def replayed_of(model: LanguageModel, graphs: bool | None) -> tuple[Replayed | None, str]:
    """A model's decodes as graphs; or None, and why. BackendError if `graphs` asks for them all the same."""
    if graphs is False:
        return None, "graphs=False"
    if model.device.type not in CAPTURES:
        return None, f"it is on {model.device}"
    try:
        return Replayed(model), ""
    except NotReplayed as why:
        if graphs:
            raise BackendError(f"{model.name} cannot be served with graphs=True: {why}; leave graphs out") from why
        log.warning("%s: decodes are no CUDA graphs, and take longer: %s", model.name, why)
        return None, str(why)


Shape = tuple[int, int, int]
"""Lanes, tokens of each, and keys that attention reads of each."""


def as_at_first(model: LanguageModel) -> None:
    """Give back storage of slots that nobody uses yet, and capture graphs that read what is left."""
    model.cache.shrink()
    if model.replayed is not None:
        model.replayed.keep_up(at_once=True)


class Replayed:
    """A language model's decodes as graphs: one for each number of lanes and keys; and its short prompts.

    Attributes:
        replays: how often each was replayed, by its shape.
        later: shapes that are captured once they are used, with their uses so far.
        unreplayed: why prompts are not; "": they are.
        version: of the slots' storage that they read.

    Raises:
        NotReplayed: this model's cannot be, and why.
    """

    def __init__(self, model: LanguageModel) -> None:
        cache, began = _checked(model), stopwatch()
        self._cache, self._fixed, self._model = cache, model.fixed, proxy(model)
        self._tables = tables_of(model.model)
        self._kept = [weight.detach() for _, _, weight in places_of(model.model)]  # graphs do not keep them
        self._lanes = (cache.slots,) if model.fixed is not None else _doubling(1, cache.slots)
        self._contexts = model.fixed.contexts if model.fixed is not None else _doubling(SHORTEST, cache.length)
        self._prompts = () if model.fixed is not None else tuple([n for n in PROMPTS if n <= cache.first])
        self._inputs = {n: torch.zeros(4, n, dtype=torch.long, device=model.device) for n in self._lanes}
        self._texts = {n: torch.zeros(5, n, dtype=torch.long, device=model.device) for n in self._prompts}
        self._graphs: dict[Shape, Callable[[], torch.Tensor]] = {}
        self._capture = CAPTURES[model.device.type](model.device)
        self.replays: Counter[Shape] = Counter()
        self.later: Counter[Shape] = Counter()
        self.unreplayed = "" if self._prompts else "there are none"
        with as_it_was(model.model), without_cudnn_attention(model.device):
            self._fill(model)
            self._begin(self._first())
            self._try_decodes(model)
            try:
                self._capture_prompts()
                self._try_prompts(model)
            except NotReplayed as why:
                self._give_up_prompts(why)
        for slot in range(cache.slots):
            cache.scrub(slot)
        self.replays.clear()
        many, took = len(self._graphs), stopwatch() - began
        log.info("%s: %d CUDA graphs in %.1f s, %d once they are used", model.name, many, took, len(self.later))

    def takes(self, rows: Sequence[Row]) -> bool:
        """Whether there are graphs for rows: decodes and few short prompts, none with a look at an image.

        Not while other tables are in the place of those that were there.
        """
        same = bool(self._graphs) and all(some.get(key) is table for some, key, table in self._tables)
        return same and all(row.sight is None for row in rows) and self._short([r for r in rows if len(r.tokens) > 1])

    def _short(self, prompts: Sequence[Row]) -> bool:
        most = self._prompts[-1] if self._prompts else 0
        return len(prompts) <= TOGETHER and all(row.start == 0 and row.end <= most for row in prompts)

    def lanes(self, count: int) -> int:
        """Lanes of the smallest graph for so many texts: those in slots below share it."""
        return next(lanes for lanes in self._lanes if lanes >= count)

    def __call__(self, rows: Sequence[Row]) -> torch.Tensor:
        """The logits behind each row's last token, float32 [rows, vocabulary]; rows are in the order of their slots."""
        fixed = None
        if self._fixed is not None:
            fixed = [(some, self._fixed.shape(some)) for some in self._fixed.calls(rows)]
        self._cache.reserve(max([row.end for row in rows] if fixed is None else [shape[2] for _, shape in fixed]))
        self.keep_up()
        if not self._graphs:
            return self._model.stock_forward(rows)
        calls = self._calls(rows) if fixed is None else fixed
        behind = [self._replay(some, shape) for some, shape in calls]
        if len(calls) == 1:
            return behind[0]
        slots = [row.slot for some, _ in calls for row in some]
        found = dict(zip(slots, torch.cat(behind), strict=True))
        return torch.stack([found[row.slot] for row in rows])

    @torch.inference_mode()
    def keep_up(self, *, at_once: bool = False) -> None:
        """Capture graphs anew where the slots' storage was made anew; `at_once`: all that are there from the start.

        Where that cannot be, there are none from then on.
        """
        if self.version == self._cache.version:
            return
        many = self._first()
        with as_it_was(self._model.model), without_cudnn_attention(self._model.device):
            try:
                self._begin(many if at_once or self._fixed is not None else many[:1])
            except NotReplayed as why:
                self._graphs.clear()
                log.warning("%s: decodes are no CUDA graphs any more, and take longer: %s", self._model.name, why)
                return
            try:
                self._capture_prompts()
            except NotReplayed as why:
                self._give_up_prompts(why)

    # -- inside -----------------------------------------------------------------------------------

    def _give_up_prompts(self, why: NotReplayed) -> None:
        log.warning("%s: prompts are no CUDA graphs, and take longer: %s", self._model.name, why)
        self._prompts, self.unreplayed = (), str(why)

    def _calls(self, rows: Sequence[Row]) -> list[tuple[list[Row], Shape]]:
        """Rows by graph: decodes, then each prompt."""
        decodes = [row for row in rows if len(row.tokens) == 1]
        found: list[tuple[list[Row], Shape]] = []
        if decodes:
            end = max(row.end for row in decodes)
            context = next(context for context in self._contexts if context >= end)
            found.append((decodes, self._there((self.lanes(decodes[-1].slot + 1), 1, context))))
        for row in rows:
            if len(row.tokens) > 1:
                tokens = next(tokens for tokens in self._prompts if tokens >= row.end)
                found.append(([row], (1, tokens, tokens)))
        return found

    def _there(self, shape: Shape) -> Shape:
        """The shape of a graph that is there, for decodes of some shape: its own, or a larger one."""
        if shape not in self.later:
            return shape if shape in self._graphs else self._larger(shape)
        self.later[shape] += 1
        if self.later[shape] < USES:
            return self._larger(shape)
        del self.later[shape]
        with as_it_was(self._model.model), without_cudnn_attention(self._model.device):
            try:
                self._capture_shape(shape[0], shape[2])
            except NotReplayed as why:
                log.warning("%s: there is no CUDA graph of shape %s: %s", self._model.name, shape, why)
                return self._larger(shape)
        return shape

    def _larger(self, shape: Shape) -> Shape:
        """Of the graphs that are there, the one that reads the fewest keys for decodes of a shape."""
        lanes, _, context = shape
        able = [one for one in self._graphs if one[1] == 1 and one[0] >= lanes and one[2] >= context]
        return min(able, key=lambda one: one[0] * one[2])

    def _replay(self, rows: Sequence[Row], shape: Shape) -> torch.Tensor:
        for row in rows:
            self._cache.note(row.slot, row.end)
        if shape[1] == 1:
            self._load(rows, shape[0])
        else:
            self._load_prompt(rows[0], shape[1])
        self.replays[shape] += 1
        return self._graphs[shape]()[: len(rows)].clone()  # the next replay writes over it

    def _load_prompt(self, row: Row, tokens: int) -> None:
        """Tell the graph of a prompt of so many tokens what to compute: what is behind the prompt is kept nowhere."""
        ids, beyond = list(row.tokens), tokens - row.end
        places = list(range(tokens))
        to, last = places[: row.end] + [self._cache.room] * beyond, max(row.end - 1, 0)
        _send([ids + [0] * beyond, places, to, [row.slot] * tokens, [last] * tokens], self._texts[tokens])

    def _load(self, rows: Sequence[Row], lanes: int) -> None:
        """Tell the graphs of so many lanes what to compute, in one copy; lanes without a row write beyond the texts."""
        ids, positions, to, wanted = [0] * lanes, [0] * lanes, [self._cache.room] * lanes, [0] * lanes
        for at, row in enumerate(rows):
            ids[row.slot], wanted[at] = row.tokens[0], row.slot
            positions[row.slot] = to[row.slot] = row.start
        _send([ids, positions, to, wanted], self._inputs[lanes])

    def _capture_shape(self, lanes: int, context: int) -> None:
        self._load([], lanes)  # what it is tried with comes later
        call = Decodes(self._inputs[lanes], context)
        self._graphs[lanes, 1, context] = _captured(self._capture, partial(_logits, self._model, call))

    def _shapes(self) -> list[tuple[int, int]]:
        """Lanes and keys of all graphs that the slots have room for, the largest first."""
        contexts = [context for context in reversed(self._contexts) if context <= self._cache.room]
        return [(lanes, context) for lanes in reversed(self._lanes) for context in contexts]

    def _first(self) -> list[tuple[int, int]]:
        """Those that are there from the start, of the most lanes or the most keys; the largest first."""
        keys = self._shapes()
        most = keys[0]
        return [(lanes, context) for lanes, context in keys if lanes == most[0] or context == most[1]]

    def _begin(self, first: Sequence[tuple[int, int]]) -> None:
        """Capture some graphs of decodes, the largest first, whose memory the others share; no others are there."""
        self.version = self._cache.version
        self._graphs.clear()
        self.later.clear()
        self.later.update(
            {(lanes, 1, context): 0 for lanes, context in self._shapes() if (lanes, context) not in first}
        )
        for lanes, context in first:
            self._capture_shape(lanes, context)

    def _try_decodes(self, model: LanguageModel) -> None:
        """Try each number of lanes, and of keys."""
        low = dict(zip(self._contexts, (0, *self._contexts), strict=False)) if self._fixed is not None else {}
        for lanes, context in self._first():
            self._try(model, (lanes, 1, context), _rows(model, lanes, context, low.get(context, 0)))

    def _capture_prompts(self) -> None:
        last = self._cache.slots - 1
        for tokens in reversed(self._prompts):
            self._load_prompt(Row(last, 0, ()), tokens)  # the slot may have a text: nothing is written to it
            call = Prompt(self._texts[tokens])
            self._graphs[1, tokens, tokens] = _captured(self._capture, partial(_prompt_logits, self._model, call))

    def _try_prompts(self, model: LanguageModel) -> None:
        last, most = self._cache.slots - 1, min(model.known, model.vocabulary)
        for tokens in self._prompts:
            row = Row(last, 0, [(7 * at + 1) % most for at in range(tokens - 3)])
            self._try(model, (1, tokens, tokens), [row])

    def _fill(self, model: LanguageModel) -> None:
        """Slots full of noise, as large as the keys and values of a first token."""
        model.stock_forward([Row(0, 0, (0,))])
        random = torch.Generator(model.device).manual_seed(0)
        for layer in self._cache.used:
            for storage in (layer.keys, layer.values):
                spread = storage[0, :, 0].float().std().nan_to_num().clamp(min=1e-3).to(storage.dtype)
                storage.normal_(generator=random).mul_(spread)

    def _try(self, model: LanguageModel, shape: Shape, rows: Sequence[Row]) -> None:
        """NotReplayed if a graph's logits are not those of the model's own call; with buckets, to the last bit."""
        wanted = model.stock_forward(rows)
        got = self._replay(rows, shape)
        most = 0.0 if self._fixed is not None else CLOSE.get(model.model.dtype, CLOSE_HALF)
        off = max(apart(one, other) for one, other in zip(got, wanted, strict=True))
        if not off <= most:
            lanes, tokens, keys = shape
            what = f"{lanes} lanes and {keys} keys" if tokens == 1 else f"{tokens} tokens"
            raise NotReplayed(f"logits of a graph of {what} differ from its own by {off:.1e} of the largest")


def _checked(model: LanguageModel) -> Slots:
    """The slots of a model; NotReplayed for models that are not tried."""
    if not isinstance(model.cache, Slots):
        raise NotReplayed("its requests have caches of their own")
    if model.adapters is not None:
        raise NotReplayed("its layers have adapters")
    if getattr(model.model.config, "vision_config", None) is not None:
        raise NotReplayed("it looks at images")
    if model.unchanged.watched:
        raise NotReplayed("its modules have hooks, which no graph calls")
    try:
        check_modules(model.model)
    except NotRecorded as why:
        raise NotReplayed(f"{why}, which no graph calls") from why
    return model.cache


def _logits(model: LanguageModel, call: Decodes) -> torch.Tensor:
    """The logits that are wanted, float32 [lanes, vocabulary]."""
    heads = getattr(model.config, "num_attention_heads", 1)
    grouped = model.packs and getattr(model.config, "num_key_value_heads", None) not in (None, heads)
    with packing(model.config, call) if grouped else nullcontext():
        return model.last(call)[call.wanted]


def _prompt_logits(model: LanguageModel, call: Prompt) -> torch.Tensor:
    """The logits behind a prompt, float32 [1, vocabulary]."""
    logits = model.logits(call, model.only(call.wanted))[0]
    return (logits if model.keeps else logits[call.wanted]).float()


def _send(values: Sequence[Sequence[int]], inputs: torch.Tensor) -> None:
    inputs.copy_(torch.tensor(values, pin_memory=inputs.is_cuda), non_blocking=True)


def _captured(capture: Capture, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    try:
        return capture(function)
    except NotCaptured as why:
        raise NotReplayed(str(why)) from why
    except Exception as error:  # whatever code does that cannot be captured
        raise NotReplayed(f"a capture failed: {told(error)}") from error


def _doubling(first: int, last: int) -> tuple[int, ...]:
    """`first`, its doubles below `last`, and `last`."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return (*found, last)


def _rows(model: LanguageModel, lanes: int, context: int, low: int) -> list[Row]:
    """Decodes of which the last reads `context` keys, the others from `low` on; some lanes have none."""
    slots = [slot for slot in range(lanes) if slot % 3 != 1 or slot == lanes - 1]
    starts = [low + (37 * slot + 11) % (context - low) for slot in slots[:-1]] + [context - 1]
    most = min(model.known, model.vocabulary)
    return [Row(slot, start, ((5 * slot + start) % most,)) for slot, start in zip(slots, starts, strict=True)]
