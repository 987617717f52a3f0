"""The dialect of nop: no load, only how long the server takes to be ready."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict

from neustream.bench.profiles.marks import Ignored, Section


class Nop(Section):
    """A whole profile."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_name: str | None = None
    pvc_name: Annotated[str | None, Ignored("no volume of a cluster is looked at")] = None
