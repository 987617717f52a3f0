"""A stock causal language model that computes tokens of several requests in one forward call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from neustream.backends.torch import OUT_OF_MEMORY, device_name, lacks_memory, without_cudnn_attention
from neustream.backends.transformers.adapters import Adapters, adapters_of
from neustream.backends.transformers.facts import arguments_of, eos_of, known_of, lengths_of, logits_bytes
from neustream.backends.transformers.fixed import fixed_of, floor
from neustream.backends.transformers.growing import grows
from neustream.backends.transformers.looking import inputs_of
from neustream.backends.transformers.masks import NotShared, masks_of
from neustream.backends.transformers.own import Own
from neustream.backends.transformers.packed import STOCK, Packed, implementation, is_cold, packing
from neustream.backends.transformers.prepacked import Prepacked, prepacked_of
from neustream.backends.transformers.proof import as_it_was, prove
from neustream.backends.transformers.proof_own import Way, prove_own
from neustream.backends.transformers.recorded import NotRecorded, Recorded
from neustream.backends.transformers.replayed import Replayed, as_at_first, replayed_of, spare_tokens
from neustream.backends.transformers.slots import Call, Row, Slots, groups
from neustream.backends.transformers.still import Decodes
from neustream.backends.transformers.unchanged import Unchanged
from neustream.backends.values import whole
from neustream.errors import BackendError, StageFailed, told

MASKED = ("sdpa", "eager")
"""Attention implementations that take a mask of our own."""
MOST_SLOTS = 2**31 - 1


class LanguageModel:
    """The user's model, unchanged, with KV slots beside it.

    Args:
        model: any `AutoModelForCausalLM`, or a model of text with an encoder.
        slots: requests that can be under way at once.
        max_len: tokens of one request, prompt and outputs; default: all positions, of an encoder's too.
        buckets: lengths; with some, all calls have fixed shapes, by which results do not depend on
            the company to the last bit (see `Fixed`). `max_len` is always one of them.
        proof: of an earlier one with the same arguments: a model that is as it was then is not
            tried again.
        prepack: whether linear layers read copies of their weights in oneDNN's own layout (see
            `Prepacked`); on a CPU. None: in float32, if there is memory for them.
        graphs: whether decodes are CUDA graphs (see `Replayed`). None: on CUDA, where they can be.
        beside: another one, which may have the same weights: copies are shared then.
        kv_tokens: that slots may take memory for, all together; None: `slots * max_len`.

    Attributes:
        way: how its requests are computed, as the trial at the start found.
        adapters: that requests may choose; None: there are none.
        recorded: its packed calls, taken down; None: it computes by calls of the model itself, and
            `unrecorded` says why.
        replayed: its decodes as CUDA graphs; None: they are calls, and `unreplayed` says why.
        keeps: whether it can leave out logits.
        read, reach: positions of an encoder; tokens that a text in one of the model's halves may have.
        device: that its weights are on; a model that is moved while it is served is noticed.
        cache: the slots; or, where they cannot be shared, the requests with caches of their own.

    Raises:
        BackendError: requests would not get what they get alone, and why; or slots find no memory.
    """

    way: Way
    cache: Slots | Own

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int = 16,
        max_len: int | None = None,
        buckets: Sequence[int] = (),
        proof: Unchanged | None = None,
        prepack: bool | None = None,
        graphs: bool | None = None,
        beside: LanguageModel | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        name = type(model).__name__
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise BackendError(f"a transformers model that generates (AutoModelForCausalLM) is needed, got {name}")
        if model.training:
            raise BackendError(f"{name} is in training mode, in which dropout makes results random: call model.eval()")
        config = model.config.get_text_config(decoder=True)
        attention = implementation(config)
        if attention not in MASKED:
            raise BackendError(
                f"{name} runs with attention {attention!r}; load it with attn_implementation='sdpa' or 'eager'"
            )
        self.model, self.name = model, name
        self.device: torch.device = model.device
        self.eager = attention == "eager"
        self.config = config
        self.vocabulary: int = config.vocab_size
        self.positions, self.read, self.max_len, self.reach = lengths_of(name, model.config, max_len)
        slots = whole("slots", slots, 1, MOST_SLOTS, error=BackendError)
        self.fixed = fixed_of(buckets, slots, self.max_len)
        self.known = known_of(model, self.vocabulary)
        self.eos = eos_of(model)
        self.prepacked: Prepacked | None = prepacked_of(model, prepack, None if beside is None else beside.prepacked)
        self._cold = is_cold(model)
        self._kv_tokens, self._spare = kv_tokens, spare_tokens(self.device, graphs)
        self.adapters: Adapters | None = None
        self.recorded: Recorded | None = None
        self.replayed: Replayed | None = None
        self.unchanged = self._proved(slots, proof)
        self.adapters = adapters_of(self)
        if self.adapters is not None:
            self._try_adapters(self.adapters)
        self.recorded, self.unrecorded = self._recorded()
        with torch.inference_mode():
            self.replayed, self.unreplayed = replayed_of(self, graphs)
        as_at_first(self)  # trials have filled it

    @torch.inference_mode()
    def _recorded(self) -> tuple[Recorded | None, str]:
        try:
            return Recorded(self), ""
        except NotRecorded as why:
            return None, str(why)

    def _try_adapters(self, adapters: Adapters) -> None:
        try:
            adapters.prove(self)
        except Exception as error:
            if not lacks_memory(error):
                raise
            raise BackendError(
                f"{self.name}: no memory to try its adapters ({error}); give fewer slots or a smaller max_len"
            ) from error

    def _proved(self, slots: int, proof: Unchanged | None) -> Unchanged:
        """What the model was when it was tried in company: now, unless `proof` still holds."""
        if proof is not None and proof.holds(self.model):
            self.way = proof.way
            if self.way.why:
                self.cache = Own(self.model, slots, self.reach, joins=self.way.batched)
            else:
                self._share(slots)
            self.packs = self.way.packed
            if not self.way.why:
                self._make_room()
            return proof
        try:
            self._share(slots)
            self._tried()
            self.way = Way(packed=self.packs)
        except NotShared as error:
            self.packs = False
            self.way = self._apart(slots, str(error))
        with as_it_was(self.model):
            return Unchanged(self.model, self.way)

    def _share(self, slots: int) -> None:
        """Keys and values of all requests in slots; NotShared: the model is not made for that."""
        self.cache_name, self.keeps = arguments_of(self.model)
        self._last_only = {"logits_to_keep": 1} if self.keeps else {}
        self._masks = masks_of(self.model, self.max_len, self.model.dtype if self.eager else None)
        self.packs = self.fixed is None and implementation(self.config) == STOCK and self._masks.plain
        beside = 0 if grows(self.device) else logits_bytes(self.model, slots)
        least = 0 if self.fixed is None else self.fixed.contexts[0]
        self.cache = Slots(self.model, slots, self.max_len, self._kv_tokens, self._spare, beside, least)

    @torch.inference_mode()
    def _make_room(self) -> None:
        """A first call makes the slots: no step that is served waits for their memory."""
        try:
            with as_it_was(self.model):
                self.forward([Row(0, 0, (0,))])
        except OUT_OF_MEMORY as error:
            raise self._no_room(error) from error
        self.cache.scrub(0)

    def _no_room(self, error: BaseException) -> BackendError:
        smaller = ", a smaller max_len or a smaller kv_cache" if grows(self.device) else " or a smaller max_len"
        what = f"no memory for the keys and values of {self.slots} slots of {self.max_len} tokens on {self.device}"
        return BackendError(f"{self.name}: {what}; give fewer slots{smaller} ({error})")

    def _tried(self) -> None:
        try:
            self._proven()
        except BackendError:
            raise
        except Exception as error:  # whatever a model does that was not made for this
            if lacks_memory(error):
                raise self._no_room(error) from error
            raise NotShared(
                f"a call with requests of different lengths failed with {type(error).__name__}: {error}"
            ) from error

    def _proven(self) -> None:
        try:
            prove(self)
        except OUT_OF_MEMORY:
            raise
        except Exception:
            if not self.packs:
                raise
            self.packs = False  # some attend by themselves: these need lanes
            prove(self)

    def _apart(self, slots: int, why: str) -> Way:
        """Each request with a cache of its own; BackendError: not even so do they get what they get alone."""
        if self.fixed is not None:
            raise BackendError(f"{self.name} cannot be served with buckets: {why}; give no buckets")
        own = self.cache = Own(self.model, slots, self.reach)
        try:
            way: Way = prove_own(own, self.known, why)
            return way
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"{self.name} cannot be served: alone, a call failed with {told(error)}") from error

    @property
    def slots(self) -> int:
        return self.cache.slots

    @property
    def begins(self) -> Sequence[int] | None:
        """What outputs begin with where an encoder reads the prompt; None: they go on from the prompt."""
        return self.cache.begins if isinstance(self.cache, Own) else None

    @property
    def piecewise(self) -> bool:
        """Whether texts are computed in pieces that depend on themselves alone: see `floor`."""
        return self.fixed is not None or not self.way.parts

    def floor(self, end: int, prompt: int) -> int:
        """The last place up to `end` where one piece of a text ends and another begins."""
        return floor(end, prompt) if self.fixed is not None else end if end >= prompt else 0

    def alike(self, prompt: int) -> int:
        """Tokens of a prompt that another sequence of it may go on from; the last one is always left to compute."""
        return self.floor(prompt - 1, prompt) if self.piecewise else prompt - 1

    @property
    def place(self) -> str:
        """What profiles of it are labelled with: the device that it runs on."""
        return device_name(self.device)

    def lanes(self, count: int) -> float:
        """The first slots in which decodes of so many texts cost least; infinite: any are as good."""
        return float("inf") if self.replayed is None else self.replayed.lanes(count)

    def together(self, rows: Mapping[str, Row]) -> list[list[str]]:
        """Requests by forward call, in the order of their slots."""
        parts = [rows] if self.adapters is None else self.adapters.groups(rows)
        return [group for part in parts for group in self._together(part)]

    def _together(self, rows: Mapping[str, Row]) -> list[list[str]]:
        if isinstance(self.cache, Own):
            return [sorted(rows, key=lambda id: rows[id].slot)] if rows else []
        if not self.packs:
            return groups(rows)
        seeing = {id: row for id, row in rows.items() if row.sight is not None}
        others = sorted(rows.keys() - seeing.keys(), key=lambda id: rows[id].slot)
        return groups(seeing) + ([others] if others else [])

    def _may_pack(self, rows: Sequence[Row]) -> bool:
        """Whether rows are computed as one lane: a single one is one as it is, with the stock attention."""
        return self.packs and len(rows) > 1 and all(row.sight is None for row in rows)

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """Compute the rows' tokens, their keys and values into their slots; the logits behind each row's last.

        Rows are given in the order of their slots. Returns float32 [rows, vocabulary].
        """
        replayed, recorded = self.replayed, self.recorded
        if replayed is not None and replayed.takes(rows) and not self.unchanged.watched:
            return replayed(rows)
        if recorded is None or not recorded.takes(rows) or self.unchanged.watched:
            return self.stock_forward(rows)
        return recorded(self.packed(rows))

    @torch.inference_mode()
    def stock_forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """The same by a call of the model itself."""
        with self._layers(rows):
            return self._computed(rows)

    def packed(self, rows: Sequence[Row]) -> Packed:
        """Rows as one lane, which the cache's next call is for."""
        assert isinstance(self.cache, Slots)
        size, dtype = self.cache.token_bytes, self.cache.dtype
        call = Packed(rows, self.device, size, self.max_len, cold=self._cold, dtype=dtype)
        self.cache.select(call)
        return call

    def look(self) -> None:
        """Begin `check_step` while a GPU still computes the step's last call, which nothing that comes now changes."""
        if self.device.type != "cpu":
            self.unchanged.look()

    def check_step(self) -> None:
        """StageFailed if the model was changed, or weights of which copies are read; on the device's thread."""
        self.unchanged.check_step()
        if self.prepacked is not None and self.prepacked.stale():
            raise self.unchanged.error(StageFailed, "its weights were written to")

    @contextlib.contextmanager
    def _layers(self, rows: Sequence[Row]) -> Iterator[None]:
        """The model's layers as they are to compute some rows."""
        with contextlib.ExitStack() as using:
            using.enter_context(without_cudnn_attention(self.device))
            if self.prepacked is not None:
                using.enter_context(self.prepacked.used())
            if self.adapters is not None:
                using.enter_context(self.adapters.alike(rows))
            yield

    def chosen(self, adapter: str | None) -> contextlib.AbstractContextManager[None]:
        """Its layers with an adapter; None: with what is active."""
        return contextlib.nullcontext() if self.adapters is None else self.adapters.one(adapter)

    def _mixed(self, call: Packed | Call | Decodes) -> contextlib.AbstractContextManager[None]:
        """The layers with the adapters that rows of a call choose."""
        if self.adapters is None or isinstance(call, Decodes):
            return contextlib.nullcontext()
        return self.adapters.mixed(call)

    def _computed(self, rows: Sequence[Row]) -> torch.Tensor:
        if isinstance(self.cache, Own):
            return self.cache.forward(rows)
        if self._may_pack(rows):
            return self._packed(self.packed(rows))
        if self.fixed is None:
            return self.last(Call(rows, self.max_len, self.device))
        behind: dict[int, torch.Tensor] = {}
        for some in self.fixed.calls(rows):
            logits = self.last(Call(some, self.max_len, self.device, self.fixed.shape(some)))
            behind |= zip([row.slot for row in some], logits, strict=True)
        return torch.stack([behind[row.slot] for row in rows])

    @torch.inference_mode()
    def all_logits(self, row: Row) -> torch.Tensor:
        """Compute one row as `forward` does; the logits [tokens, vocabulary] behind each of its tokens."""
        with self._layers([row]):
            return self._all_computed(row)

    def _all_computed(self, row: Row) -> torch.Tensor:
        if isinstance(self.cache, Own):
            return self.cache.all_logits(row)
        if self.fixed is None:
            logits = self.logits(Call([row], self.max_len, self.device), {})
            return logits[0, -len(row.tokens) :].float()
        found = []
        for (piece,) in self.fixed.calls([row]):
            call = Call([piece], self.max_len, self.device, self.fixed.shape([piece]))
            logits = self.logits(call, {})
            lane = 0 if call.lanes is None else int(call.lanes[0])
            found.append(logits[lane, -len(piece.tokens) :].float())
        return torch.cat(found)

    def only(self, wanted: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """How the model is asked for the logits at these places of a lane; nothing if it gives all."""
        return {"logits_to_keep": wanted} if self.keeps and wanted is not None else {}

    def _packed(self, call: Packed) -> torch.Tensor:
        wanted = call.wanted
        which = self.only(wanted)
        with packing(self.config, call), self._mixed(call):
            out = self.model(
                input_ids=call.ids,
                position_ids=call.positions,
                use_cache=True,
                **{self.cache_name: self.cache},
                **which,
            )
        logits: torch.Tensor = out.logits[0]
        return (logits if wanted is None or which else logits[wanted]).float()

    def last(self, call: Call | Decodes) -> torch.Tensor:
        """The logits behind the last token of each of a call's rows, float32."""
        logits = self.logits(call, self._last_only)[:, -1]
        return (logits if call.lanes is None else logits[call.lanes]).float()

    def logits(self, call: Call | Decodes, which: Mapping[str, int]) -> torch.Tensor:
        """Logits [lanes, tokens, vocabulary]; only the last with `which` as the model says that."""
        assert isinstance(self.cache, Slots)
        self.cache.select(call)
        mask = None if call.whole else self._masks.of(call)
        with self._mixed(call):
            out = self.model(
                **inputs_of(self.model, call),
                attention_mask=mask,
                use_cache=True,
                **{self.cache_name: self.cache},
                **which,
            )
        logits: torch.Tensor = out.logits
        return logits
