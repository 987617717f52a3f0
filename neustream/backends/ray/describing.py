"""What a request is, before it is served: its graph and what it asks for, from its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from neustream.backends.ray.wire import Described, Guess, loads
from neustream.cluster.book import asked_of
from neustream.core.events import Submitted
from neustream.core.job import Job
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO, Request
from neustream.engine.answers import Result, settle
from neustream.engine.member import Member
from neustream.errors import GraphError, NeustreamError
from neustream.service.mount import OWN, Call, Probe
from neustream.service.service import Service


class Describing:
    """Looks at requests for a cluster, at one of its instances."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def describe(self, id: str, payload: bytes, slo: SLO | None) -> Future[Described]:
        """What a request is; the future raises what its model has against the arguments.

        `slo`: None: what is promised here.
        """
        slo = self.service.slo if slo is None else slo
        answer: Future[Described] = Future()
        try:
            model, args, kwargs = loads(payload)
            _, mount = self.service.mount(model)
            asked = mount.request(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  the answer raises it
            answer.set_exception(error)
            return answer
        if isinstance(asked, Call):
            self._described(id, asked, slo, answer)
        else:
            self._probe(id, asked, slo, answer)
        return answer

    def _described(self, id: str, call: Call, slo: SLO, answer: Future[Described]) -> None:
        """Say what a call asks for; it is not served yet."""
        call.over()
        try:
            asked = asked_of(Request(id, call.graph, slo=slo, params=call.params))
            known = self.service.engine.inspect(_profiles)  # its stages may be new: they come first
        except NeustreamError as error:
            answer.set_exception(error)
            return

        def say() -> Described:
            profiles = {stage: known.result()[stage] for stage in call.graph.stages}
            return Described(call.graph, asked, slo, profiles, call.reader is not None)

        known.add_done_callback(lambda _: settle(answer, say))

    def _probe(self, id: str, probe: Probe, slo: SLO, answer: Future[Described]) -> None:
        """Have the device look at a request of a new kind."""
        try:
            done = self.service.engine.submit(probe.graph, probe.params, id=f"{OWN}probe/described/{id}")
        except NeustreamError as error:
            probe.over()
            answer.set_exception(error)
            return

        def seen(done: Future[Result]) -> None:
            try:
                call = probe.then(done.result())
            except Exception as error:  # noqa: BLE001  the answer raises it
                probe.over()
                answer.set_exception(error)
            else:
                self._described(id, call, slo, answer)

        done.add_done_callback(seen)


def holds(guess: Guess, record: Submitted, job: Job | None) -> bool:
    """Whether a request that came just now is what it was taken for. `job`: None if it is over already."""
    if job is None:
        return (guess.graph, guess.steps) == (record.graph, record.steps)
    graph = job.request.graph
    try:
        sizes = {name: stage.size_of(job) for name, stage in graph.stages.items() if name in guess.sizes}
    except GraphError:  # what was looked at had one
        return False
    return guess.holds(Guess(record.graph, record.steps, sizes), graph)


def _profiles(members: Sequence[Member], now: float) -> Mapping[str, LatencyProfile]:
    """What steps take, of the only member."""
    return dict(members[0].scheduler.times.profiles)
