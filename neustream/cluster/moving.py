"""The move of a request, in five steps: room, copy, hold, give, took.

    head -> target   Reserve   room is kept there; else nothing happened
    head -> source   Copy      state that is large and only grows is copied while steps go on
    head -> source   Hold      it waits at the end of its step (`Waits`); never polled for
    head -> source   Give      source -> target: a `Parcel`; the source keeps its own copy
    target -> head   Took      the target is the owner, with a new term; the source forgets

Until `Took` the source is the owner, and goes on with its own copy if the move is called off. What
the target makes of a parcel that comes too late has a term that is not current: it is not heard,
and `Free` reaches the target before or after the parcel.
"""

from __future__ import annotations

import math

from neustream.cluster.book import Book, Moving, Open
from neustream.cluster.fleet import Instance
from neustream.cluster.happenings import Moved, Saved, Unmoved
from neustream.cluster.messages import (
    Cancel,
    Copied,
    Copy,
    Free,
    Give,
    Hold,
    Reserve,
    Resume,
    Took,
    Waits,
)

LARGE = 16
"""Tokens: state of fewer is not copied in advance."""


class Moves:
    """Carries out moves."""

    def __init__(self, book: Book) -> None:
        self.book = book

    def begin(self, one: Open, target: Instance, reason: str, now: float) -> None:
        """Ask the target for room."""
        book = self.book
        one.issued += 1
        until = now + book.settings.move_timeout_s
        one.moving = Moving(target.name, one.issued, reason, "room", until)
        number = book.fleet.sent(target, one.ask(now), moved=True)
        tokens = one.asked.tokens + one.delivered if one.asked.tokens and one.began else 0.0
        book.orders.append(Reserve(target.name, one.id, one.issued, number, tokens))
        book.wake(one, until)

    def copy(self, one: Open, keeper: str, now: float) -> None:
        """Have another instance keep a copy of a request, which waits for that meanwhile."""
        one.issued += 1
        until = now + self.book.settings.move_timeout_s
        one.moving = Moving(keeper, one.issued, "snapshot", "hold", until, keep=True)
        self._hold(one, one.moving)
        self.book.wake(one, until)

    def copied_whole(self, one: Open, now: float) -> Moving:
        """The copy is kept: the request goes on where it is."""
        moving, book = one.moving, self.book
        assert moving is not None
        one.moving = None
        book.wake(one, math.inf)
        book.orders.append(Resume(one.where, one.id, one.term))
        book.events.append(Saved(one.id, one.where, moving.target, moving.held_at, now))
        return moving

    def under_way(self, instance: str) -> int:
        """Moves away from an instance."""
        moving = [one.moving for one in self.book.at[instance].values() if one.moving is not None]
        return sum([not each.keep for each in moving])

    # -- the steps --------------------------------------------------------------------------------

    def reserved(self, one: Open) -> None:
        """There is room."""
        moving = one.moving
        if moving is None or moving.step != "room":
            return
        if one.away:
            moving.copied = 0.0  # whoever goes on there cannot fill its KV cache anew
            self._give(one, moving, moving.held_at)
        elif self._worth_copying(one, moving):
            moving.step = "copy"
            order = Copy(one.where, one.id, one.term, moving.target, moving.term)
            self.book.orders.append(order)
        else:
            self._hold(one, moving)

    def _worth_copying(self, one: Open, moving: Moving) -> bool:
        """Whether its KV cache is copied: if that is quicker than to compute it anew."""
        source = self.book.instance(one.where)
        tokens = one.asked.tokens + one.delivered
        if source is None or not source.token_bytes or not one.began or tokens < LARGE:
            return False
        rates = self.book.fleet.rates[source.device]
        prefill = next((name for name in one.asked.calls if name.endswith(".prefill")), None)
        if prefill is None:
            return False
        anew = rates.profiles[prefill].latency(1, tokens, tokens * tokens)
        return tokens * source.token_bytes / self.book.settings.bandwidth < anew

    def copied(self, one: Open, told: Copied) -> None:
        """Most of its state is there in advance."""
        moving = one.moving
        if moving is not None and moving.step == "copy":
            moving.copied = told.tokens
            self._hold(one, moving)

    def _hold(self, one: Open, moving: Moving) -> None:
        moving.step = "hold"
        self.book.orders.append(Hold(one.where, one.id, one.term))

    def waits(self, one: Open, told: Waits, now: float) -> None:
        """It waits at a step boundary."""
        moving = one.moving
        if moving is not None and moving.step == "hold":
            moving.left = told.left
            self._give(one, moving, now)

    def _give(self, one: Open, moving: Moving, now: float) -> None:
        moving.step, moving.held_at = "take", now
        target, term, copied = moving.target, moving.term, moving.copied
        order = Give(one.where, one.id, one.term, target, term, copied, moving.keep)
        self.book.orders.append(order)

    def took(self, one: Open, told: Took, now: float) -> None:
        """The target has it."""
        moving, book = one.moving, self.book
        assert moving is not None
        source, term = one.where, one.term
        one.moving, one.away = None, ""
        one.term, one.moved_at = moving.term, now
        if source in book.fleet.instances:
            book.orders.append(Free(source, one.id, term))
        book.put(one, moving.target)
        book.wake(one, math.inf)
        if one.cancelled:  # the source did not have it any more
            book.orders.append(Cancel(one.where, one.id, one.term))
        book.events.append(Moved(one.id, source, moving.target, moving.reason, moving.held_at, now))

    # -- what goes wrong --------------------------------------------------------------------------

    def call_off(self, one: Open, why: str, now: float) -> None:
        """Nothing comes of a move: the request goes on where it is, or tries again if it cannot."""
        moving, book = one.moving, self.book
        assert moving is not None
        one.moving = None
        again = now + book.settings.move_s if one.away else math.inf  # it cannot go on where it is
        book.wake(one, again)
        if moving.target in book.fleet.instances:
            book.orders.append(Free(moving.target, one.id, moving.term))
        held = moving.step in ("hold", "take") and not one.away
        if held and one.where in book.fleet.instances:
            book.orders.append(Resume(one.where, one.id, one.term))
        if moving.keep:
            one.uncopied += 1
        else:
            book.events.append(Unmoved(one.id, one.where, moving.target, why, now))
