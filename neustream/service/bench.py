"""A mount on a device on which nobody is served: measured there, or asked what it offers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from neustream.core.batch import input_of
from neustream.core.policy import Pool
from neustream.core.types import Request
from neustream.core.work import Walk
from neustream.engine.answers import Result
from neustream.engine.executor import StreamModule
from neustream.errors import StageFailed
from neustream.service.members import device_at, open_all, pool_of
from neustream.service.mount import OWN, Call, Instance, Mount, Probe


class Bench:
    """A mount, open on one device; its `Host`. A context manager, which closes it.

    Args:
        name: of the model; "" is the name of one that is alone.
        place: the device, as torch calls it.

    Raises:
        BackendError: the model cannot be served there.
    """

    def __init__(self, mount: Mount, place: str, name: str = "") -> None:
        self.mount = mount
        mount.check(name)
        self._instance = Instance({}, {})
        with contextlib.ExitStack() as undo:
            self.device = device_at(place, undo)
            ((opened,),) = [one.values() for one in open_all({name: mount}, [self.device], {name: [0]}, self, undo)]
            self._instance = opened.with_(self._instance)
            self._undo = undo.pop_all()

    @property
    def modules(self) -> Mapping[str, StreamModule]:
        """By stage, of all that calls went through so far."""
        return self._instance.modules

    @property
    def pool(self) -> Pool:
        """The pool that a service would make for it."""
        return pool_of({"": self.mount}, tuple(self._instance.profiles))

    def call(self, *args: Any, **kwargs: Any) -> Call:
        """A request as the engine would get it; what a probe has to tell is found out at once.

        Raises what `Mount.request` does, and what comes of the probe.
        """
        asked = self.mount.request(*args, **kwargs)
        call = self._probed(asked) if isinstance(asked, Probe) else asked
        call.over()
        return call

    def _probed(self, probe: Probe) -> Call:
        try:
            return probe.then(self._serve(probe))
        except BaseException:
            probe.over()
            raise

    def _serve(self, probe: Probe) -> Result:
        walk = Walk(Request(f"{OWN}probe", probe.graph, params=probe.params))
        update: Mapping[str, Any] = {}
        while walk.stage is not None:
            module = self._instance.modules[walk.stage.name]
            (found,) = module.step([input_of(walk.job)])
            if isinstance(found, StageFailed):
                raise found.__cause__ or found
            update = found
            walk.advance(update)
        return Result(walk.job.id, "done", "", update, 0.0, True)

    def extend(self, instances: Mapping[str, Instance]) -> None:
        """See `Host`."""
        for instance in instances.values():
            self._instance = self._instance.with_(instance)

    def retire(self, stages: Mapping[str, Sequence[str]]) -> None:
        """See `Host`: it forgets nothing."""

    def make_way(self) -> None:
        """See `Host`: whoever has a bench needs it."""

    def close(self) -> None:
        self._undo.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
