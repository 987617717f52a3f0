"""Forwards that layers of a model have for the time of calls: they make a difference in the calls' threads only."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_lending = threading.Lock()


class Lent:
    """What a layer does while calls run.

    Attributes:
        stock: what it does else; of a model that was copied, that of its own layer.
        users: calls that run.
    """

    __slots__ = ("stock", "users")

    def __init__(self, layer: torch.nn.Module) -> None:
        self.stock = layer.forward
        self.users = 0

    @property
    def layer(self) -> torch.nn.Module:
        found: torch.nn.Module = self.stock.__self__
        return found


@contextlib.contextmanager
def lent(layers: Iterable[torch.nn.Module], kind: type[Lent]) -> Iterator[None]:
    """Give each layer a forward of a kind, unless another call did, or it has one of its own."""
    entered = []
    with _lending:
        for layer in layers:
            own = layer.__dict__
            forward = own["forward"] if "forward" in own else kind(layer)
            if type(forward) is not kind:
                continue
            forward.users += 1
            own["forward"] = forward
            entered.append((own, forward))
    try:
        yield
    finally:
        with _lending:
            for own, forward in entered:
                forward.users -= 1
                if not forward.users and own.get("forward") is forward:  # else somebody has put another one there
                    del own["forward"]


def own_forward(own: dict[str, Any]) -> Any:
    """The forward that somebody has given a module with these attributes, whether or not a call runs."""
    found = own.get("forward")
    return None if isinstance(found, Lent) else found
