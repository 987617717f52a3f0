"""The head of a cluster: it knows who is where, and says what is to be done. No I/O in here.

The contract, for whoever drives it (a simulator, Ray actors):

1. `joined` for each instance, then `submit` and `cancel` for callers, `heard` for each message of
   an instance (in its order, each once), `lost` where a process is known to be dead, and `tick` at
   `wake_at()`. After each of them carry out `pop_orders()`, in order.
2. Orders with an `instance` go there, in order, each once (`messages.py` says what each means and
   what its answer is; `member_instance.py` is the other side). `Start` and `Stop` are for who runs
   instances, `Answer` and `Forward` for callers: the one answer of a request, and its outputs.
3. A request has one owner: the instance and the term of its latest placement that is acknowledged
   (`Took`). Each placement and each try of a move gets a new term. Reports of another instance or
   an older term change nothing, and what they speak of is freed there.
4. At least once executed, exactly once answered; output k goes out once, in order. An instance that
   is silent is suspect, then gone (its requests begin anew), and is fenced if it comes back.
5. A head that begins anew has the next `epoch`. The instances join it; callers submit again what
   is open, with the outputs that they have (`succession.py`). How often each began anew before, and
   how many instances died with it, the instances tell (`past.py`).
6. `now` is the head's clock. Instances are told ages and budgets; nobody else's instants are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from neustream.cluster import messages as say
from neustream.cluster.book import Again, Book, Open, Settings, asked_of
from neustream.cluster.fleet import Fleet, Instance, Mover, Router, Scaler
from neustream.cluster.happenings import Happening
from neustream.cluster.liveness import Liveness
from neustream.cluster.moving import Moves
from neustream.cluster.placing import Placing
from neustream.cluster.scaling import Scaling
from neustream.cluster.snapshots import Snapshots
from neustream.cluster.succession import Succession
from neustream.core.events import Update
from neustream.core.graph import Graph
from neustream.core.outlook import Asked, Outlook
from neustream.core.profile import LatencyProfile
from neustream.core.rates import Rates
from neustream.core.stage_names import named
from neustream.core.types import Request
from neustream.errors import GraphError, RequestError, nearest


class Head:
    """Routes requests to instances, moves them, and gives each its one answer.

    Args:
        graphs: what may be asked for; instances have the same ones.
        profiles: latencies of the stages by kind of device.
        router, mover, scaler: the rules. Without a mover nothing moves but what has to; without a
            scaler the instances are as many as join.
        again: what becomes of the streams of a graph whose instance is gone, by its name; else
            "fail".
        epoch: above that of all heads before (see `epochs`); 0: there was none.
        mark: a hash of what a request asks for, where callers may give an id to another one.
        stopwatch: real seconds, to tell what routing costs.
    """

    def __init__(
        self,
        graphs: Sequence[Graph],
        profiles: Mapping[str, Mapping[str, LatencyProfile]],
        router: Router,
        mover: Mover | None = None,
        scaler: Scaler | None = None,
        *,
        settings: Settings | None = None,
        again: Mapping[str, Again] = {},
        epoch: int = 0,
        mark: Callable[[Request], bytes] = lambda request: b"",
        seed: int = 0,
        stopwatch: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.settings = settings or Settings()
        self.graphs = {graph.name: graph for graph in graphs}
        self.fleet = Fleet({name: Rates(each) for name, each in profiles.items()}, seed)
        self._again = again
        self._book = book = Book(self.fleet, self.settings)
        self.fleet.requests = book.places
        self.fleet.queued = lambda: [one.asked for one in book.waiting.values()]
        self.router = router
        self._succession = Succession(book, epoch, mark)
        self._placing = Placing(book, router, self._succession, stopwatch)
        self._moves = Moves(book)
        self._liveness = Liveness(book, self._placing, self._moves)
        self._scaling = Scaling(book, self._placing, self._moves, mover, scaler)
        self._snapshots = Snapshots(book, self._moves)

    @property
    def open(self) -> int:
        """Requests without an answer."""
        return len(self._book.requests)

    def open_ids(self) -> list[str]:
        """Their ids."""
        return list(self._book.requests)

    def steps_of(self, id: str) -> int:
        """Calls of looped stages that an open request is expected to take."""
        return self._book.requests[id].steps

    # -- callers ----------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        now: float,
        *,
        made: Sequence[Update] = (),
        late: bool = False,
        asked: Asked | None = None,
    ) -> None:
        """A caller's request.

        Args:
            made: outputs that it has, where it asks again after a restart of the head; late:
                whether one of them was.
            asked: what it asks for, where only an instance can tell.

        Raises:
            RequestError: its id is open.
            GraphError: nobody serves its graph, or the graph cannot be asked.
        """
        if request.id in self._book.requests:
            raise RequestError(f"request id {request.id!r} is already being served")
        if self.graphs.get(request.graph.name) is not request.graph:
            hint = nearest(request.graph.name, self.graphs)
            raise GraphError(f"graph {request.graph.name!r} is not served here; {hint}")
        asked = asked or asked_of(request)
        steps = asked.steps(request.graph)
        due = request.arrival + request.slo.total
        again = self._again.get(request.graph.name, "fail")
        one = Open(request, asked, request.arrival, due, due, steps, again)
        one.term = one.issued = self._succession.before
        one.had(made)
        one.late = late
        self._book.requests[one.id] = one
        self.fleet.came(asked, now)
        self._placing.place(one, now)

    def correct(self, id: str, asked: Asked) -> None:
        """What an open request asks for turned out to be something else; nothing if it is over."""
        one = self._book.requests.get(id)
        if one is not None:
            one.asked, one.steps = asked, asked.steps(one.request.graph)

    def cancel(self, id: str, now: float) -> bool:
        """A caller gives its request up; False if it is not open."""
        one = self._book.requests.get(id)
        if one is None or one.cancelled:
            return False
        self._placing.cancel(one, now)
        return True

    def move(self, id: str, instance: str, reason: str, now: float) -> None:
        """Have a request go on at another instance.

        RequestError if it is not at one, or moves already, or that one takes no requests.
        """
        one, target = self._book.requests.get(id), self._book.instance(instance)
        if one is None or not one.place().free:
            raise RequestError(f"move: request {id!r} is not at an instance, or cannot leave it")
        if target is None or target.state != "up" or one.where == instance:
            up = [each.name for each in self.fleet.instances.values() if each.state == "up"]
            others = [name for name in up if name != one.where]
            raise RequestError(
                f"move: instance {instance!r} is none of those it could go to: {others}"
            )
        self._moves.begin(one, target, reason, now)

    def scale(self, scaler: Scaler) -> None:
        """Have another scaler from now on."""
        self._scaling.use(scaler)

    # -- instances --------------------------------------------------------------------------------

    def joined(
        self,
        instance: str,
        now: float,
        *,
        stages: Sequence[str],
        role: str = "whole",
        device: str = "",
        prints: Mapping[str, str] = {},
        token_bytes: float = 0.0,
        only: tuple[str, ...] | None = None,
    ) -> None:
        """An instance is there and takes requests.

        Args:
            stages: that it serves; only: names by which it does of graphs that are to come (see
                `stage_names.named`); None: all.
            prints: those of its graphs (`Graph.print`), by name.
            token_bytes: what a token in its KV cache takes; 0: it is never copied.

        Raises:
            RequestError: its name is taken, or nothing is known of its kind of device.
            GraphError: one of its graphs differs from the one here.
        """
        for name, graph in self.graphs.items():
            if prints.get(name, graph.print) != graph.print:
                raise GraphError(
                    f"instance {instance!r}: its graph {name!r} has print {prints[name]}; "
                    f"the one here has {graph.print}"
                )
        if device not in self.fleet.rates:
            hint = nearest(device, self.fleet.rates)
            raise RequestError(f"instance {instance!r}: no profiles of device {device!r}; {hint}")
        rates = self.fleet.rates[device]
        for stage in stages:
            if stage not in rates.profiles:
                raise RequestError(
                    f"instance {instance!r}: stage {stage!r} has no profile on device {device!r}"
                )
        outlook = Outlook(instance, now)
        found = Instance(instance, 0, role, device, frozenset(stages), outlook, now, now)
        found.token_bytes, found.only = token_bytes, only
        self.fleet.add(found)
        self._book.at[instance] = {}
        self._scaling.joined(found)
        self._liveness.watch(now)
        self._succession.joined(instance, now)
        self._placing.retry(now)

    def extend(
        self, graph: Graph, profiles: Mapping[str, LatencyProfile], device: str, again: Again
    ) -> None:
        """One more graph may be asked for, of all instances.

        `profiles`: of its stages, on a kind of `device`. Other kinds are expected to be like that
        where nothing is known of them.
        """
        self.graphs[graph.name] = graph
        self._again = {**self._again, graph.name: again}
        self.know(device, profiles)
        for instance in self.fleet.instances.values():
            instance.stages |= {stage for stage in graph.stages if named(stage, instance.only)}
            self.fleet.changed(instance)

    def know(self, device: str, profiles: Mapping[str, LatencyProfile]) -> None:
        """Latencies of stages on a kind of device; others are like that until more is known."""
        rates = self.fleet.rates
        rates.setdefault(device, Rates({})).profiles.update(profiles)
        for each in rates.values():
            for other in rates.values():
                each.profiles = {**other.profiles, **each.profiles}

    def not_started(self, role: str, why: str, now: float) -> None:
        """An instance that was ordered could not be started."""
        self._scaling.not_started(role)

    def overslept(self, seconds: float, now: float) -> None:
        """Whoever runs the head did not run for so long: nobody could be heard meanwhile."""
        self._liveness.overslept(seconds, now)

    def lost(self, instance: str, why: str, now: float) -> None:
        """An instance's process is dead."""
        self._liveness.lost(instance, why, now, fence=False)
        if self._succession.lost(now):
            self._placing.retry(now)

    def drain(self, instance: str, now: float) -> None:
        """An instance is to go: it gets nothing new, and ends when nothing is left there.

        RequestError if there is none of that name.
        """
        found = self._book.instance(instance)
        if found is None:
            raise RequestError(
                f"no instance {instance!r}; {nearest(instance, self.fleet.instances)}"
            )
        self._scaling.drain(found, now)

    def heard(self, instance: str, message: say.Report, now: float) -> None:
        """A message of an instance. That of one which is not known is answered by a fence."""
        found = self.fleet.instances.get(instance)
        if found is None:
            self._liveness.returned(instance, isinstance(message, say.Fenced), now)
            if self._book.instance(instance) is not None:
                self._placing.retry(now)
            return
        self._liveness.heard(found, now)
        match message:
            case say.Told():
                self.fleet.told(found, message.outlook)
            case say.Here():
                if self._succession.here(instance, message, now):
                    self._placing.retry(now)
            case say.Fenced():
                return
            case _:
                self._of_request(found, message, now)

    def _of_request(
        self,
        instance: Instance,
        told: say.OfRequest,
        now: float,
    ) -> None:
        """What an instance says of a request, if it has a say."""
        one = self._book.requests.get(told.id)
        if one is not None and one.where == instance.name and one.term == told.term:
            self._of_owner(one, told, now)
        elif one is not None and one.moves_to(instance.name, told.term):
            self._of_target(one, told, now)
        elif not isinstance(told, say.Refused | say.Copied | say.Over):
            self._book.orders.append(say.Free(instance.name, told.id, told.term))

    def _of_owner(self, one: Open, told: say.Report, now: float) -> None:
        match told:
            case say.Took():
                one.phase = "there"
                one.restoring = False
                if one.moving is None and not one.away:
                    self._book.wake(one, math.inf)
                self._placing.unheard(one, told.unheard, now)
            case say.Began():
                one.begin(now)
                self._snapshots.began(one, now)
            case say.Made():
                self._placing.made(one, told, now)
            case say.Over():
                if one.moving is not None:
                    self._moves.call_off(one, "it is over", now)
                self._placing.over(one, told, now)
            case say.Refused() if one.moving is not None:
                self._liveness.refused(one, told.reason, now)
            case say.Refused():
                self._placing.refused(one, told.reason, now)
            case say.Waits() if one.cancelled:  # it was on its way out, and did not hear of that
                self._book.orders.append(say.Cancel(one.where, one.id, one.term))
            case say.Waits(away=stage) if stage:
                self._scaling.leg(one, stage, now)
            case say.Waits():
                self._moves.waits(one, told, now)

    def _of_target(self, one: Open, told: say.Report, now: float) -> None:
        assert one.moving is not None
        match told:
            case say.Reserved():
                self._moves.reserved(one)
            case say.Copied():
                self._moves.copied(one, told)
            case say.Kept():
                self._snapshots.kept(one, now)
            case say.Took() if one.moving.step == "take":
                self._moves.took(one, told, now)
                self._placing.unheard(one, told.unheard, now)
            case say.Refused():
                self._liveness.refused(one, told.reason, now)

    # -- time -------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Time has passed."""
        self.fleet.now = now
        for one in self._book.due(now):
            if one.moving is not None:
                self._liveness.overdue(one, now)
            elif one.away:
                self._scaling.leg(one, one.away, now)
            else:
                self._placing.again(one, now)
        self._liveness.tick(now)
        self._scaling.tick(now)
        self._snapshots.tick(now)

    def wake_at(self) -> float | None:
        """When `tick` is due at the latest; None: not before something happens."""
        at = min(
            self._book.next_timer,
            self._liveness.next_at,
            self._scaling.next_at,
            self._snapshots.next_at,
        )
        return at if at < math.inf else None

    @property
    def wants(self) -> bool:
        """Whether there is something to be done or told."""
        return bool(self._book.orders or self._book.events or self._book.begun_anew)

    def pop_orders(self) -> list[say.Order]:
        """What is to be done, in order."""
        self._succession.pasts.tell()
        orders, self._book.orders = self._book.orders, []
        return orders

    def pop_events(self) -> list[Happening]:
        """What happened, for observers."""
        events, self._book.events = self._book.events, []
        return events
