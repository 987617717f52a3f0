"""What a model's `generation_config` says of its texts, where a request does not say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from neustream.backends.transformers.said import said_of
from neustream.backends.transformers.sampling import Sampling
from neustream.errors import BackendError, RequestError, shown

OF_DRAWS = ("top_k", "top_p", "min_p", "typical_p")
TAKEN = {
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "bad_words_ids",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
"""Names there, and names of `Sampling`."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "diversity_penalty": (0,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "cache_implementation": tuple([one for one in ALL_CACHE_IMPLEMENTATIONS if one != "quantized"]),
}
"""What says nothing, of that which is not served; of the others None only."""
NOT_SERVED = (
    *NEUTRAL,
    "max_time",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "watermarking_config",
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What requests get that do not say otherwise.

    Args:
        sampling: by the names of `Sampling`.
        max_tokens, max_length: new tokens, and these with the tokens before them; None: to the end of the context.
        warm: the temperature of requests that draw.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    max_length: int | None = None
    warm: float = 1.0

    def filled(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What a request asks, and the defaults of what it leaves open (None)."""
        return {**self.sampling, **{name: value for name, value in asked.items() if value is not None}}

    @property
    def of_lengths(self) -> Defaults:
        """What it says of lengths alone."""
        return Defaults(max_tokens=self.max_tokens, max_length=self.max_length)

    def tokens(self, begins: int, most: int) -> int:
        """New tokens of a request that does not say how many: `most`, if nothing here says otherwise.

        `begins`: tokens before the first of them: the prompt's, or those that a decoder begins with.
        RequestError where `max_length` leaves none behind these.
        """
        if self.max_tokens is not None:
            return max(min(most, self.max_tokens), 1)
        if self.max_length is not None:
            if begins >= self.max_length:
                raise RequestError(
                    f"the prompt has {begins} tokens, and generation_config says max_length={self.max_length}: "
                    f"at most {self.max_length - 1}, or give max_tokens"
                )
            return max(min(most, self.max_length - begins), 1)
        return max(most, 1)


def defaults_of(name: str, generation_config: Any) -> Defaults:
    """What `generation_config` of model `name` says; BackendError for what cannot be served as it says."""
    said = {} if generation_config is None else generation_config.to_dict()
    for key in NOT_SERVED:
        value = said.get(key)
        if value is not None and value not in NEUTRAL.get(key, ()):
            raise BackendError(
                f"{name} cannot be served as its generation_config says: {key}={shown(value)} is not supported; "
                f"set model.generation_config.{key} = None to do without"
            )
    sampling: dict[str, Any] = {name: said[key] for key, name in TAKEN.items() if said.get(key) is not None}
    sampling |= {key: said[key] for key in OF_DRAWS if said.get(key) is not None}
    sampling["said"] = said_of(name, said)
    warm = said.get("temperature")
    warm = 1.0 if warm is None else warm
    if said.get("do_sample"):
        sampling["temperature"] = warm
    try:
        Sampling(**sampling, seed=None)
    except (RequestError, TypeError) as error:
        raise BackendError(f"generation_config of {name}: {error}") from error
    return Defaults(sampling, said.get("max_new_tokens"), said.get("max_length"), warm)
