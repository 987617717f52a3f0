"""Which instances are there: suspect, gone, back; and what becomes of the requests they had."""

from __future__ import annotations

import math

from neustream.cluster.book import Book, Open
from neustream.cluster.fleet import Instance
from neustream.cluster.happenings import Lost
from neustream.cluster.messages import Fence, Free
from neustream.cluster.moving import Moves
from neustream.cluster.placing import Placing


class Liveness:
    """Watches instances. `next_at`: when it has to look again."""

    def __init__(self, book: Book, placing: Placing, moves: Moves) -> None:
        self._book = book
        self._placing = placing
        self._moves = moves
        self._gone: dict[str, Instance] = {}
        self.next_at = math.inf

    def heard(self, instance: Instance, now: float) -> None:
        """An instance spoke."""
        instance.heard_at = now
        if instance.state == "suspect":
            instance.state = "up" if instance.drain_at == math.inf else "draining"
            self._book.fleet.changed(instance)
            self._placing.retry(now)

    def watch(self, now: float) -> None:
        """An instance is there from now on, whether it ever speaks or not."""
        self.next_at = min(self.next_at, now + self._book.settings.suspect_s)

    def returned(self, name: str, fenced: bool, now: float) -> None:
        """An instance that was given up spoke; once it has forgotten everything it serves again."""
        instance = self._gone.get(name)
        if instance is None:
            return
        if not fenced:
            if instance.state != "fencing":
                instance.state = "fencing"
                self._book.orders.append(Fence(name))
            return
        del self._gone[name]
        instance.state, instance.heard_at = "up", now
        instance.sent.clear()
        self._book.fleet.add(instance)
        self._book.at[name] = {}
        self.watch(now)

    def tick(self, now: float) -> None:
        """Look who is silent."""
        if now < self.next_at:
            return
        settings = self._book.settings
        self.next_at = math.inf
        for instance in list(self._book.fleet.instances.values()):
            if now >= instance.heard_at + settings.dead_s:
                self.lost(instance.name, f"silent for {settings.dead_s:g} s", now, fence=True)
                continue
            limit = settings.dead_s
            if now >= instance.heard_at + settings.suspect_s:
                if instance.state != "suspect":
                    instance.state = "suspect"
                    self._book.fleet.changed(instance)
            else:
                limit = settings.suspect_s
            self.next_at = min(self.next_at, instance.heard_at + limit)

    def overslept(self, seconds: float, now: float) -> None:
        """Seconds in which the head itself was away are no silence of instances."""
        for instance in self._book.fleet.instances.values():
            instance.heard_at = min(instance.heard_at + seconds, now)

    def lost(self, name: str, why: str, now: float, *, fence: bool) -> None:
        """An instance is gone. With `fence` it may come back, and has to forget everything then."""
        book = self._book
        instance = book.instance(name)
        if instance is None:
            if not fence:
                self._gone.pop(name, None)
            return
        book.fleet.remove(instance)
        requests = book.at.pop(name)
        if fence:
            instance.state = "gone"
            self._gone[name] = instance
        book.events.append(Lost(name, why, len(requests), now))
        for one in self._towards(name):
            self._moves.call_off(one, f"instance {name!r} is gone", now)
            if one.where not in book.fleet.instances:
                self._orphan(one, instance, why, now)
        for one in requests.values():
            if one.id not in book.requests or one.where != name:
                continue
            if one.moving is not None and one.moving.step == "take" and not one.moving.keep:
                continue  # the target may have it: its `Took` or the time limit says
            if one.moving is not None:
                self._moves.call_off(one, f"instance {name!r} is gone", now)
            self._orphan(one, instance, why, now)

    def _towards(self, name: str) -> list[Open]:
        """Requests on the move to an instance."""
        found = []
        for one in self._book.requests.values():
            if one.moving is not None and one.moving.target == name:
                found.append(one)
        return found

    def _orphan(self, one: Open, instance: Instance, why: str, now: float) -> None:
        """A request whose instance is gone. Who may have been in its step is noted."""
        unreported = one.number in instance.sent
        one.deaths += one.began or unreported
        self._placing.restart(one, f"lost with instance {instance.name!r} ({why})", now)

    def refused(self, one: Open, reason: str, now: float) -> None:
        """A target does not take a request. One that can go nowhere stays where it is."""
        one.fixed = reason if reason.startswith("not movable") else ""
        self.called_off(one, reason, now)

    def overdue(self, one: Open, now: float) -> None:
        """A move takes too long."""
        self.called_off(one, "it took too long", now)

    def called_off(self, one: Open, why: str, now: float) -> None:
        """A move comes to nothing; the request begins anew if its source is gone meanwhile."""
        one.untaken = why
        self._moves.call_off(one, why, now)
        if one.where not in self._book.fleet.instances:
            self._placing.restart(one, f"lost with instance {one.where!r} while it moved", now)
        elif one.away and one.fixed:
            self._book.orders.append(Free(one.where, one.id, one.term))
            reason = f"stage {one.away!r} is served elsewhere, and it cannot go there: {one.fixed}"
            self._placing.end(one, "failed", reason, None, now)
