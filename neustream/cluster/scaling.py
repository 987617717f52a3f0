"""What is asked now and then: which requests move, how many instances there are, who drains."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from neustream.cluster.book import Book, Open
from neustream.cluster.fleet import Instance, Mover, Scaler
from neustream.cluster.happenings import Scaled
from neustream.cluster.messages import Free, Start, Stop
from neustream.cluster.moving import Moves
from neustream.cluster.placing import RETRY_S, Placing


class Scaling:
    """Asks movers and scalers, and lets instances go. `next_at`: when it has to look again."""

    def __init__(
        self,
        book: Book,
        placing: Placing,
        moves: Moves,
        mover: Mover | None,
        scaler: Scaler | None,
    ) -> None:
        self._book = book
        self._placing = placing
        self._moves = moves
        self._mover = mover
        self._scaler = scaler
        self._move_at = 0.0 if mover is not None else math.inf
        self._scale_at = 0.0 if scaler is not None else math.inf
        self._drain_at = math.inf

    def use(self, scaler: Scaler) -> None:
        """Ask another scaler from now on, and at once."""
        self._scaler, self._scale_at = scaler, 0.0

    @property
    def next_at(self) -> float:
        return min(self._move_at, self._scale_at, self._drain_at)

    def tick(self, now: float) -> None:
        """Ask who is due to be asked."""
        settings = self._book.settings
        if now >= self._drain_at:
            self._drain(now)
        if self._mover is not None and now >= self._move_at:
            self._move_at = now + settings.move_s
            self._move(self._mover)
        if self._scaler is not None and now >= self._scale_at:
            self._scale_at = now + settings.scale_s
            self._scale(self._scaler, now)

    # -- moves ------------------------------------------------------------------------------------

    def _move(self, mover: Mover) -> None:
        book = self._book
        now = book.fleet.now
        for move in mover.moves(book.fleet):
            one = book.requests.get(move.id)
            target = book.instance(move.target)
            if (
                one is None
                or target is None
                or one.where != move.source
                or move.target == one.where
            ):
                continue
            if not one.place().free or target.state != "up":
                continue
            if self._moves.under_way(one.where) < book.settings.most_moves:
                self._moves.begin(one, target, move.reason, now)

    def leg(self, one: Open, stage: str, now: float) -> None:
        """The next stage of a request is served elsewhere: it moves there."""
        if one.moving is not None:
            self._moves.call_off(one, f"its next stage, {stage!r}, is served elsewhere", now)
        if one.away != stage:
            one.away, one.away_at, one.untaken = stage, now, ""
        target = self._target(one, now)
        if target is not None and one.untaken and now > self._latest(one):
            self._lose(one, f"nobody takes it for stage {stage!r}: {one.untaken}", now)
        elif target is not None:
            self._moves.begin(one, target, f"stage {stage}", now)
            assert one.moving is not None
            one.moving.held_at = now
        elif now > min(one.due, one.away_at + self._book.settings.patience_s):
            self._lose(one, f"no instance serves stage {stage!r}", now)
        else:
            self._book.wake(one, now + RETRY_S)

    def _latest(self, one: Open) -> float:
        """Until when a request asks again that is not taken where its next stage is."""
        patient = one.away_at + self._book.settings.patience_s
        return patient if one.due == math.inf else max(one.due, patient)

    def _lose(self, one: Open, reason: str, now: float) -> None:
        """A request cannot go on."""
        self._book.orders.append(Free(one.where, one.id, one.term))
        self._placing.end(one, "failed", reason, None, now)

    def _target(self, one: Open, now: float) -> Instance | None:
        """Where the router would send a request that has to leave."""
        fleet = self._book.fleet
        fleet.now = now
        asked = one.ask(now)
        if one.away:
            calls = asked.calls
            names = list(calls)
            if one.away in names:
                rest = names[names.index(one.away) :]
                calls = {name: calls[name] for name in rest}
            asked = replace(asked, stage=one.away, calls=calls)
        if not len(fleet.able(asked)):
            return None
        route = self._placing.router.route(fleet, asked)
        return None if route.instance is None else fleet.instances.get(route.instance)

    # -- instances --------------------------------------------------------------------------------

    def joined(self, instance: Instance) -> None:
        """An instance is there, maybe one that was ordered."""
        starting = self._book.fleet.starting
        if starting.get(instance.role, 0) > 0:
            starting[instance.role] -= 1

    def not_started(self, role: str) -> None:
        """One that was ordered is not."""
        starting = self._book.fleet.starting
        starting[role] = max(starting.get(role, 0) - 1, 0)

    def _scale(self, scaler: Scaler, now: float) -> None:
        """Start and drain instances, so that there are as many as the scaler wants."""
        book = self._book
        target = scaler.target(book.fleet)
        serving = [each for each in book.fleet.instances.values() if each.state != "draining"]
        count = Counter(each.role for each in serving)
        for role, wanted in target.items():
            there = count[role] + book.fleet.starting.get(role, 0)
            for _ in range(wanted - there):
                book.fleet.starting[role] = book.fleet.starting.get(role, 0) + 1
                book.orders.append(Start(role))
            of_role = [each for each in serving if each.role == role]
            of_role.sort(key=lambda each: len(book.at[each.name]))
            for each in of_role[: max(there - wanted, 0)]:
                self.drain(each, now)
            if wanted != there:
                book.events.append(Scaled(role, wanted, now))

    def drain(self, instance: Instance, now: float) -> None:
        """An instance is to go."""
        if instance.drain_at < math.inf:
            return
        instance.state = "draining"
        instance.drain_at = now + self._book.settings.drain_s
        self._book.fleet.changed(instance)
        self._drain_at = now

    def _drain(self, now: float) -> None:
        """See what is left at instances that are to go."""
        book = self._book
        self._drain_at = math.inf
        for instance in list(book.fleet.instances.values()):
            if instance.drain_at == math.inf:
                continue
            if now >= instance.drain_at:
                for one in list(book.at[instance.name].values()):
                    self._put_out(one, now)
            if not book.at[instance.name]:
                book.fleet.remove(instance)
                del book.at[instance.name]
                book.orders.append(Stop(instance.name, "drained"))
                continue
            self._drain_at = now + book.settings.move_s
            self._empty(instance, now)

    def _empty(self, instance: Instance, now: float) -> None:
        """Move what can be moved away from an instance."""
        for one in list(self._book.at[instance.name].values()):
            if not one.place().free:
                continue
            if self._moves.under_way(instance.name) >= self._book.settings.most_moves:
                return
            target = self._target(one, now)
            if target is None:
                return
            self._moves.begin(one, target, "drain", now)

    def _put_out(self, one: Open, now: float) -> None:
        """What did not leave in time begins anew elsewhere."""
        if one.moving is not None:
            self._moves.call_off(one, "the instance ends", now)
        self._book.orders.append(Free(one.where, one.id, one.term))
        self._placing.restart(one, f"instance {one.where!r} ended", now)
