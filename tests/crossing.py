"""Services between which requests move, at a step that a test chooses."""

from __future__ import annotations

import pickle
from concurrent.futures import Future


def through_bytes(moved):
    """What another process would get."""
    return pickle.loads(pickle.dumps(moved))


class Crossing:
    """Has request `id` leave `source` at the end of its step number `step` (from 1), in `left`.

    Its device is kept from a step after that by nothing but the move itself.
    """

    def __init__(self, source, id, step, *, cached=True):
        self.left = Future()
        self._source, self._id, self._step, self._cached = source, id, step, cached
        worker = source._devices[0].executor._workers[0]
        self._worker, self._run = worker, worker.step
        worker.step = self._count

    def _count(self, batch, inputs, **options):
        results = self._run(batch, inputs, **options)
        self._step -= any(given.id == self._id for given in inputs)
        if self._step == 0:
            self._worker.step = self._run
            gone = self._source.give(self._id, cached=self._cached)
            gone.add_done_callback(self._gone)
        return results

    def _gone(self, gone):
        if gone.exception() is not None:
            self.left.set_exception(gone.exception())
        else:
            self.left.set_result(gone.result())

    def to(self, target, **options):
        """The answer at `target`, once the request is there."""
        return target.take(through_bytes(self.left.result(30)), **options).result(30)
