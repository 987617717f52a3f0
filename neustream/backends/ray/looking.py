"""What a request is has to be known before it is routed: an instance looks at its arguments.

One that is like another which was looked at goes to the head at once (`alike.py`), unless the router
reads arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from neustream.backends.ray.alike import Alike
from neustream.backends.ray.callers import Caller, Machines, of_the_way
from neustream.backends.ray.waiting import Waiting
from neustream.backends.ray.wire import Described, Guess, Joined
from neustream.cluster.fleet import reads_params
from neustream.cluster.head import Head
from neustream.core.types import Request
from neustream.errors import BackendError, GraphError, NeustreamError, RequestError, RequestFailed, nearest

PATIENCE_S = 60.0
"""How long a request waits for an instance that can look at it."""
TRIES = 5
"""So many instances are asked to look at a request, if they go meanwhile."""
AGAIN_S = 0.05


class Looking:
    """Finds out what requests are, and hands them to a head. On the driver's thread.

    Args:
        waiting: who waits for an answer; places: what instances told when they came; alive: those
            that can be asked.
        post: has work done on the driver's thread.
        submitted: told of those that the head has taken.
    """

    def __init__(
        self,
        head: Head,
        machines: Machines,
        waiting: Waiting,
        places: Mapping[str, Joined],
        alive: Set[str],
        post: Callable[[Callable[[float], None]], None],
        submitted: Callable[[Request, float], None],
    ) -> None:
        self._head = head
        self._machines = machines
        self._waiting = waiting
        self._places = places
        self._alive = alive
        self._models: dict[str, None] = {}  # of all instances that there were
        self._post = post
        self._submitted = submitted
        self._alike = Alike()
        self._reads = reads_params(head.router)
        self._looking: dict[Caller, str] = {}

    def come(self, caller: Caller, now: float) -> None:
        """Route a request that is like others; have an instance look at one that is not."""
        id = caller.answer.id
        if self._waiting.get(id) is not caller:
            return
        known = None if self._reads else self._alike.get(caller.likeness, id, caller.slo)
        if known is not None:
            caller.guessed = True
            self._send(caller, known, "", now)
            return
        if caller.model is None and len(self._models) > 1:
            self._waiting.refuse(caller, RequestError(f"model=None: {nearest('None', self._models)}"))
            return
        place = self._free(caller.model)
        if not place:
            if now - caller.arrival > PATIENCE_S:
                self._waiting.refuse(caller, RequestFailed(f"request {id!r}: no instance serves{self._what(caller)}"))
            else:
                self._later(caller)
            return
        caller.tries += 1
        self._looking[caller] = place
        seen = self._machines.describe(place, id, caller.payload, caller.slo)
        seen.add_done_callback(lambda seen: self._post(partial(self._described, caller, place, seen)))

    def surprised(self, id: str) -> None:
        """A request that was routed by a guess is another one: what it is, the head is told after all."""
        caller = self._waiting.get(id)
        place = "" if caller is None else self._free(caller.model)
        if caller is not None and place:
            seen = self._machines.describe(place, id, caller.payload, caller.slo)
            seen.add_done_callback(lambda seen: self._post(partial(self._corrected, caller, place, seen)))

    def elsewhere(self, name: str) -> None:
        """An instance is gone: others look at what it was looking at."""
        for caller in [caller for caller, place in self._looking.items() if place == name]:
            del self._looking[caller]
            self._later(caller)

    def check_models(self, name: str, found: Joined) -> None:
        """BackendError for an instance that comes with some models only, and does not say what it serves."""
        known = {*self._models, *found.models}
        if found.stages is None and self._models and set(found.models) != known:
            raise BackendError(
                f"instance {name!r} has the models {list(found.models)}, others have {list(self._models)}: "
                "say which stages it serves (stages= of its service)"
            )
        self._models.update(dict.fromkeys(found.models))

    def _what(self, caller: Caller) -> str:
        return f" model {caller.model!r}" if caller.model in self._models else ""

    def _free(self, model: str | None) -> str:
        """The instance with the fewest requests of those that have a model; "": none serves.

        Any of them where no instance ever had it: that one says so.
        """
        fleet = self._head.fleet
        able = [each for each in fleet.instances.values() if each.state == "up"]
        if model in self._models:
            having = {name for name, joined in self._places.items() if model in joined.models}
            able = [each for each in able if each.name in having]
        return min(able, key=lambda each: float(fleet.live[each.row])).name if able else ""

    def _corrected(self, caller: Caller, place: str, seen: Future[Described], now: float) -> None:
        """A request that was guessed at was looked at, or is wrong: its own instance says so."""
        if seen.exception() is None and place in self._head.fleet.instances:
            found = seen.result()
            self._know(found, place)
            self._alike.add(caller.likeness, replace(found, graph=self._head.graphs[found.graph.name]))
            if self._waiting.get(caller.answer.id) is caller:
                self._head.correct(caller.answer.id, found.asked)

    def _later(self, caller: Caller) -> None:
        timer = threading.Timer(AGAIN_S, lambda: self._post(partial(self.come, caller)))
        timer.daemon = True
        timer.start()

    def _described(self, caller: Caller, place: str, seen: Future[Described], now: float) -> None:
        """What a request is is known, or why it cannot be served."""
        id = caller.answer.id
        if self._looking.get(caller) != place:
            return  # another one looks, or is about to
        del self._looking[caller]
        if self._waiting.get(id) is not caller:
            return
        fault = seen.exception()
        if fault is None and place not in self._head.fleet.instances:
            self._later(caller)  # what it has told is of an instance that is gone by now
        elif fault is None:
            self._send(caller, seen.result(), place, now)
        elif (place not in self._alive or of_the_way(fault)) and caller.tries < TRIES:
            self._later(caller)
        else:
            self._waiting.refuse(caller, fault)

    def _send(self, caller: Caller, found: Described, place: str, now: float) -> None:
        """Hand a request to the head. `place`: who looked at it; "": nobody."""
        try:
            self._know(found, place)
            graph, id = self._head.graphs[found.graph.name], caller.answer.id
            caller.described = True
            guess = None if place else Guess.of(found)
            params = {"asked": caller.payload, "guess": guess}
            request = Request(id, graph, caller.arrival, found.slo, params)
            self._head.submit(request, now, asked=found.asked)
        except NeustreamError as error:
            self._waiting.refuse(caller, error)
        else:
            self._submitted(request, now)
            if place:
                self._alike.add(caller.likeness, replace(found, graph=graph))

    def _know(self, found: Described, place: str) -> None:
        """The head has to know a request's graph; GraphError if it knows another one."""
        head, graph = self._head, found.graph
        known = head.graphs.get(graph.name)
        if known is None:
            head.extend(graph, found.profiles, head.fleet.instances[place].device, "repeat")
        elif known.print != graph.print:
            raise GraphError(
                f"instance {place!r}: its graph {graph.name!r} has print {graph.print}; the one "
                f"of other instances has {known.print}"
            )
