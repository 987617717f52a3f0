"""Previews as a stage: decoded when the scheduler says so, as many at once as the decoder takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from neustream.backends.diffusers.previews import Preview, arguments_of, to_its_decoder
from neustream.backends.diffusers.replica import Replica, failure
from neustream.backends.diffusers.request import kind_of, samples_of
from neustream.backends.diffusers.run import Run, decode
from neustream.backends.diffusers.shapes import Shape, Shapes
from neustream.backends.diffusers.signatures import signature_of
from neustream.core.batch import StepInput
from neustream.core.events import Emitted, Update
from neustream.core.graph import Graph
from neustream.engine.answers import Result
from neustream.errors import RequestError, StageFailed
from neustream.service.mount import Call, Device, Host, Instance


class PreviewModule:
    """The stage at which previews are decoded: as many at once as the decoder takes."""

    def __init__(self, replica: Replica, *, check_finite: bool) -> None:
        self._replica = replica
        self._check_finite = check_finite

    def load(self, device: str) -> None:
        """Nothing to do: models stay on the device that they are on."""

    def step(self, inputs: Sequence[StepInput]) -> Sequence[Update | StageFailed]:
        if why := self._replica.changed():
            return [StageFailed(why)] * len(inputs)
        runs = [self._begun(given.params["preview"]) for given in inputs]
        try:
            decode([run for run in runs if run.error is None], check_finite=self._check_finite)
            return [{"output": run.output} if run.error is None else failure(run.error) for run in runs]
        finally:
            for run in runs:
                run.close()

    def _begun(self, preview: Preview) -> Run:
        pipe = self._replica.pipe
        run = Run(pipe, self._replica.parts, arguments_of(pipe, preview), expected=preview.total)
        try:
            to_its_decoder(run, preview)
        except StageFailed as error:
            run.error = error
        return run

    def release(self, id: str) -> None:
        """Nothing is kept."""


class PreviewStages:
    """The stages of one pipeline's previews, on all of its devices; each is there once it was asked for."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        devices: Sequence[Device],
        host: Host,
        *,
        check_finite: bool,
    ) -> None:
        self._places = list(zip(replicas, devices, strict=True))
        self._host = host
        self._check_finite = check_finite

    def call(self, preview: Preview, shapes: Shapes, over: Callable[[Shape], None]) -> Call:
        """The picture of a step of a request; `over` is told of its shape once it has ended.

        RequestError if its shape is not served any more.
        """
        whole = {**signature_of(self._places[0][0].pipe).defaults, **preview.arguments}
        known = shapes.of_kind(kind_of(whole))
        if known is None:
            raise RequestError("the preview is of a shape that is not served any more")
        shape = known[0]
        graph = shape.preview or self._open(shape, shapes)
        shape.open += 1
        params = {"preview": preview, "samples": samples_of(whole)}
        return Call(graph, params, _output, over=partial(over, shape))

    def _open(self, shape: Shape, shapes: Shapes) -> Graph:
        graph, profile = shapes.preview(shape)
        instances = {}
        for replica, device in self._places:
            module = PreviewModule(replica, check_finite=self._check_finite)
            own = frozenset({graph.name})
            instances[device.name] = Instance({graph.name: module}, {graph.name: profile}, own=own)
        self._host.extend(instances)
        shape.preview = graph
        return graph


def _output(result: Result, outputs: Sequence[Emitted]) -> Any:
    return result.unwrap()["output"]
