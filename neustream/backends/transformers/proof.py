"""Shows, on the model itself, that requests in company get what they get alone; or says why not."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

from neustream.backends.transformers.masks import NotShared
from neustream.backends.transformers.slots import Row, Slots
from neustream.errors import BackendError, told

if TYPE_CHECKING:
    from neustream.backends.transformers.model import LanguageModel

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""By how much logits in company may differ from those alone, over the largest."""
CLOSE_HALF = 3e-2
"""The same in other dtypes."""
LIMIT = re.compile(
    r"window|chunk|block|position|length|local|ctx|context|span|keep|sink|limit|threshold|budget|seq|log"
)
"""What a config calls numbers of tokens at which something changes."""
MOST_LENGTHS = 24
"""Lengths that are tried, at most."""
ROWS = 8
"""Rows of one trial, at most."""
CHUNK = 5
"""Tokens of a prompt's part in a trial."""
APART = 97
"""By so many tokens at most, contexts of noise are shifted against each other."""
WORK = {"cpu": 4e9}
"""Multiplications of all trials with whole texts, at most, by the kind of device."""
WORK_ELSEWHERE = 1e13


@torch.inference_mode()
def prove(model: LanguageModel) -> None:
    """Try requests of all kinds of lengths in company; NotShared if one does not get what it gets alone.

    The trials are compared with the stock call on one request:

    - a text whose last token is at the last position: what is before it must not notice;
    - whole texts, as long as they are affordable, prefilled together and in parts, then decoded;
    - decodes behind contexts of all lengths at which the config says that something changes, beside
      the longest and without it. The contexts are noise: a slot and a stock cache are filled with the
      same keys and values, so a long one costs no more than a short one;
    - parts of prompts that cross these lengths, in the same way;
    - where shapes are fixed: decodes in company and alone, in another slot, to the last bit.
    """
    with as_it_was(model.model):
        trial = _Trial(model)
        lengths = lengths_of(_config(model).to_dict(), model.max_len)
        trial.last_position()
        trial.own_way()
        trial.texts(affordable(model.model, model.max_len, len(trial.cache.layers)))
        for some in companies(lengths, min(ROWS, model.slots)):
            trial.contexts(some, 1)
            trial.contexts([min(length, model.max_len - CHUNK) for length in some], CHUNK)
            if model.fixed is not None:
                trial.bits(some)
    for slot in range(min(ROWS, model.slots)):
        model.cache.scrub(slot)


def lengths_of(config: Mapping[str, Any], max_len: int) -> list[int]:
    """Contexts to be tried, each below `max_len`: some of all sizes, and those around the config's numbers."""
    last = max_len - 1
    spread = {1, 2, 9, last // 4, last // 2, last - 1, last}
    named = sorted({n for n in _limits(config, "") if n <= last + 1}, reverse=True)
    around = [n + off for n in named for off in (0, 1, -2, -1)]
    wanted = dict.fromkeys([*sorted(spread), *around])
    fit = [n for n in wanted if 1 <= n <= last]
    return sorted(fit[:MOST_LENGTHS])


def texts_of(config: Mapping[str, Any], longest: int) -> list[int]:
    """Lengths of whole texts that are tried: short ones, those at the config's largest numbers, the longest."""
    limits = sorted(n + 1 for n in set(_limits(config, "")) if n + 1 < longest)
    return sorted({n for n in (2, 5, 9, *limits[-3:], longest) if n <= longest})


def _limits(value: Any, name: str) -> Iterator[int]:
    """Whole numbers in a config, at any depth, whose names say that they are counts of tokens."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _limits(inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _limits(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool) and value > 1 and LIMIT.search(name):
        yield value


def companies(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Groups of at most `rows` lengths, each with the shortest and the longest; then without the longest."""
    if rows < 3:
        longest = lengths[-1]
        return [[length, longest][:rows] for length in lengths]
    found = []
    for some in (lengths, lengths[:-1]):
        inner = some[1:-1]
        step = rows - 2
        groups = [inner[first : first + step] for first in range(0, max(len(inner), 1), step)]
        found += [list(dict.fromkeys([some[0], *group, some[-1]])) for group in groups]
    return found


def affordable(model: PreTrainedModel, max_len: int, layers: int) -> int:
    """The longest text that the trials of a model may compute as a whole; `layers` of attention it has."""
    weights = sum(weight.numel() for weight in model.parameters())
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", None) or 1024
    most = WORK.get(model.device.type, WORK_ELSEWHERE)
    length = max_len - 1
    while length > 9 and length * weights + length * length * width * layers > most:
        length = max(9, length // 2)
    return length


def _config(model: LanguageModel) -> Any:
    return model.model.config.get_text_config(decoder=True)


HOOKED = "_output_capturing_hooks_installed"
"""Says that the library's own hooks are there; they stay, so this has to."""


@contextlib.contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Put back buffers and attributes that calls write down in modules."""
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for module in model.modules() for buffer in _scratch(module)]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            hooked = {HOOKED: True} if HOOKED in module.__dict__ else {}
            module.__dict__.clear()
            module.__dict__.update(attributes | hooked)
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _scratch(module: torch.nn.Module) -> list[torch.Tensor]:
    """Buffers of a module that are no weights."""
    found = [module._buffers[name] for name in module._non_persistent_buffers_set]
    return [buffer for buffer in found if buffer is not None and not buffer.is_meta]


class _Trial:
    """Trials of one model."""

    def __init__(self, model: LanguageModel) -> None:
        assert isinstance(model.cache, Slots)
        self.model, self.cache = model, model.cache
        self._noises: dict[int, list[torch.Tensor]] = {}
        self._known: dict[tuple[int, int], torch.Tensor] = {}

    def texts(self, longest: int) -> None:
        """Whole texts: prefilled together, the longest in two parts, then one token each."""
        slots = min(ROWS, self.model.slots)
        lengths = texts_of(_config(self.model).to_dict(), longest)[-slots:]
        texts = [self._text(at, n + 1) for at, n in enumerate(lengths)]
        half = max(1, lengths[-1] // 2)
        first = [Row(slot, 0, text[:-1]) for slot, text in enumerate(texts[:-1])]
        top = len(texts) - 1
        self.model.forward([*first, Row(top, 0, texts[-1][:half])])
        if half < lengths[-1]:
            self.model.forward([Row(top, half, texts[-1][half:-1])])
        got = self.model.forward([Row(slot, len(text) - 1, text[-1:]) for slot, text in enumerate(texts)])
        for text, logits in zip(texts, got, strict=True):
            self._compare(logits, self._alone(text), lengths)

    def contexts(self, starts: Sequence[int], count: int) -> None:
        """`count` more tokens behind contexts of noise, together and each alone in the stock cache."""
        rows = [Row(slot, max(0, start), self._text(start, count)) for slot, start in enumerate(starts)]
        if any(row.end > self.model.max_len for row in rows):
            return
        for row in rows:
            self._fill(row)
        got = self.model.forward(rows)
        for row, logits in zip(rows, got, strict=True):
            alone = self._known.get((row.start, count))
            if alone is None:  # it is the same in each company
                alone = self._known[row.start, count] = self._stock(row, self._cache(row))
            self._compare(logits, alone, [row.end for row in rows])

    def bits(self, starts: Sequence[int]) -> None:
        """A token behind each context of noise, together, and alone in another slot: the same to the last bit."""
        top = self.model.slots - 1
        rows = [Row(slot, start, self._text(start, 1)) for slot, start in enumerate(starts)]
        for row in rows:
            self._fill(row)
        together = self.model.forward(rows)
        for row, got in zip(rows, together, strict=True):
            other = Row(top - row.slot, row.start, row.tokens)
            self._fill(other)
            off = float((self.model.forward([other])[0] - got).nan_to_num().abs().max())
            if off:
                raise BackendError(
                    f"{self.model.name} cannot be served with buckets here: the same token in another company differs "
                    f"by {off:.1e}, because its kernels round by what else is in a call; give no buckets"
                )

    def last_position(self) -> None:
        """What tokens are given at the first positions must not depend on one at the last."""
        last = self.model.max_len - 1
        count = min(8, last)
        text = self._text(0, count)
        places = torch.arange(count, device=self.model.device)
        far = torch.cat((places, places.new_tensor([last])))
        near = self._call(text, places).logits[0, count - 1]
        try:
            beside = self._call([*text, text[0]], far).logits[0, count - 1]
        except IndexError as error:  # a table of positions that is too short
            raise BackendError(
                f"{self.model.name} cannot be served up to max_len={last + 1}: a call at position {last} failed with "
                f"{told(error)}; give a smaller max_len"
            ) from error
        self._compare(beside.float(), near.float(), [count, last + 1])

    def own_way(self) -> None:
        """A model that prepares its own inputs in `generate`: they must be those that it is given here."""
        stock = self.model.model
        if type(stock).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
            return
        text = self._text(3, min(9, self.model.max_len - 1))
        how = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        told = GenerationConfig(**how, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
        ids = torch.tensor([text], device=self.model.device)
        made = stock.generate(ids, attention_mask=torch.ones_like(ids), generation_config=told)
        self._compare(made.logits[0][0].float(), self._alone(text), [len(text)])

    # -- inside -----------------------------------------------------------------------------------

    def _text(self, at: int, count: int) -> list[int]:
        return [(7 * at + 3 * k + 1) % self.model.known for k in range(count)]

    def _call(self, text: Sequence[int], positions: torch.Tensor, **more: Any) -> Any:
        ids = torch.tensor([list(text)], device=self.model.device)
        return self.model.model(input_ids=ids, position_ids=positions[None], **{"use_cache": False, **more})

    def _alone(self, text: Sequence[int]) -> torch.Tensor:
        """Logits behind a text, without a cache."""
        logits: torch.Tensor = self._call(text, torch.arange(len(text), device=self.model.device)).logits[0, -1]
        return logits.float()

    def _stock(self, row: Row, cache: DynamicCache) -> torch.Tensor:
        positions = torch.arange(row.start, row.end, device=self.model.device)
        more = {"use_cache": True, self.model.cache_name: cache}
        logits: torch.Tensor = self._call(row.tokens, positions, **more).logits[0, -1]
        return logits.float()

    def _fill(self, row: Row) -> None:
        """Fill the row's slot up to its start with noise like its model's keys and values: another for each start."""
        first = row.start % APART
        self.cache.note(row.slot, row.start)
        for at, layer in enumerate(self.cache.layers):
            if layer.is_initialized:
                for storage, noise in zip((layer.keys, layer.values), self._noise(at), strict=True):
                    storage[row.slot, :, : row.start] = noise[:, first : first + row.start]

    def _cache(self, row: Row) -> DynamicCache:
        """A stock cache with what is in the row's slot up to its start."""
        cache = DynamicCache(config=self.model.model.config)
        for at, layer in enumerate(self.cache.layers):
            if layer.is_initialized and row.start:
                both = [storage[row.slot, None, :, : row.start].clone() for storage in (layer.keys, layer.values)]
                cache.update(both[0], both[1], at)
        return cache

    def _noise(self, at: int) -> list[torch.Tensor]:
        """Noise as large as the keys and values of a layer in the first trial: [heads, max_len + APART, width] each."""
        if at not in self._noises:
            layer = self.cache.layers[at]
            random = torch.Generator(self.model.device).manual_seed(at)
            self._noises[at] = []
            for storage in (layer.keys, layer.values):
                shape = (storage.shape[1], self.model.max_len + APART, storage.shape[3])
                spread = max(float(storage[0, :, 0].float().std().nan_to_num()), 1e-3)
                noise = torch.randn(shape, generator=random, device=storage.device) * spread
                self._noises[at].append(noise.to(storage.dtype))
        return self._noises[at]

    def _compare(self, got: torch.Tensor, alone: torch.Tensor, lengths: Sequence[int]) -> None:
        off = apart(got, alone)
        if not off <= CLOSE.get(self.model.model.dtype, CLOSE_HALF):
            raise NotShared(self._why(off, lengths))

    def _why(self, off: float, lengths: Sequence[int]) -> str:
        kinds = {
            kind: limit for kind, limit in _ropes(_config(self.model).to_dict()) if kind in ("dynamic", "longrope")
        }
        if kinds:
            kind, limit = next(iter(kinds.items()))
            less = f"; give max_len={limit} or less" if limit and limit < self.model.max_len else ""
            return (
                f"its rotary embedding is of type {kind!r}, whose angles depend on the longest request of a batch{less}"
            )
        if getattr(_config(self.model), "use_bidirectional_attention", None):
            return "its config says use_bidirectional_attention: tokens of a prompt see those behind them"
        some = ", ".join(map(str, sorted(set(lengths))))
        return (
            f"in company its logits differ from those alone by {off:.1e} of the largest, so its requests are not "
            f"independent of each other (tried with {some} tokens)"
        )


def apart(got: torch.Tensor, alone: torch.Tensor) -> float:
    """The largest difference of two rows of logits over the largest; infinite if others than the same are masked."""
    fine = alone.isfinite()
    if not torch.equal(got.isfinite(), fine) or not torch.equal(got[~fine].nan_to_num(), alone[~fine].nan_to_num()):
        return float("inf")
    if not bool(fine.any()):
        return 0.0
    return float((got[fine] - alone[fine]).abs().max() / alone[fine].abs().max().clamp(min=1e-20))


def _ropes(config: Any) -> Iterator[tuple[str, int | None]]:
    """Types of rotary embeddings in a config, at any depth, and the length that they were made for."""
    if not isinstance(config, Mapping):
        return
    kind = config.get("rope_type", config.get("type"))
    if isinstance(kind, str):
        yield kind, config.get("original_max_position_embeddings")
    for inner in config.values():
        yield from _ropes(inner)
