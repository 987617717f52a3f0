"""Measuring a pipeline at some sizes, without serving it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from neustream.backends.diffusers.mount import PipelineMount
from neustream.service.service import Service


def profile(pipe: DiffusionPipeline, calls: Sequence[Mapping[str, Any]], out: Path | str, **options: Any) -> list[Path]:
    """Measure the stages of `calls` of a pipeline, one for each shape.

    `serve(pipe, profiles=out)` finds the files. `options` are those of `PipelineMount`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        mount = PipelineMount(pipe, samples=calls, cache=Path(folder), **options)
        Service({"": mount}).close()
        files = sorted(Path(folder).rglob("*.json"))
        return [Path(shutil.copy(file, out / file.name)) for file in files]
