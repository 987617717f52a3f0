"""How large a config's model is, told by its architecture: nothing is loaded, no weight is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from neustream.backends.making import NEEDED
from neustream.by_name import load_object
from neustream.config.schema import Backend
from neustream.errors import BackendError, told


@dataclass(frozen=True)
class Part:
    """A network of a model: its name in the model, its class, its weights."""

    name: str
    kind: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """A model: its class, the type of its weights, its networks.

    `kv_bytes`: keys and values of one token, of a language model.
    """

    model: str
    dtype: str
    parts: Sequence[Part]
    kv_bytes: int | None = None

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


KINDS: Mapping[str, str] = {
    "diffusers": "neustream.backends.sizes.diffusers:sizes_of",
    "transformers": "neustream.backends.sizes.transformers:sizes_of",
}


def sizes_of(backend: Backend | None) -> Sizes | str:
    """The sizes of the model that a config's `backend` section describes; else why they are unknown.

    Raises:
        BackendError: there is no such architecture.
    """
    if backend is None:
        return "the config has no backend section"
    if backend.kind not in KINDS:
        return f"what backend {backend.kind!r} builds is its own"
    extra, needed = NEEDED[backend.kind]
    if missing := [name for name in needed if find_spec(name) is None]:
        return f"needs {', '.join(missing)}: pip install 'neustream[{extra}]'"
    measure: Callable[[Mapping[str, Any]], Sizes] = load_object(KINDS[backend.kind], "backend")
    try:
        return measure(backend.options)
    except BackendError:
        raise
    except Exception as error:  # whatever a library has against a config
        raise BackendError(f"backend: {told(error)}") from error
