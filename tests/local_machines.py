"""Machines of a cluster in this process: a service each, that can die or hang."""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import time
from concurrent.futures import Future

from neustream.backends.ray.driver import Driver
from neustream.backends.ray.entries import graphs_of
from neustream.backends.ray.service_instance import ServiceInstance
from neustream.backends.ray.telling import Telling
from neustream.backends.ray.wire import EngineDied, Joined
from neustream.errors import BackendError

BEAT_S = 0.02


@contextlib.contextmanager
def driving(head, make, count, machines=None):
    """A driver of `count` instances; `make(number, kind)` makes the service of each."""
    machines, events = machines or LocalMachines(make), []
    driver = Driver(head, machines, count, Telling((), [events.append]))
    driver.machines, driver.events = machines, events
    try:
        driver.up.result(30)
        yield driver
    finally:
        driver.close()
        machines.close()


class LocalMachines:
    """See `neustream.backends.ray.driver.Machines`. All messages go through bytes, as over a wire."""

    def __init__(self, make, *, observed=False, delay_s=0.0):
        """`make` makes the service of an instance by its number and kind; `delay_s`: what orders take to one."""
        self.make, self.observed, self.delay_s = make, observed, delay_s
        self.instances, self.ended = {}, []
        self.made, self.epoch, self.found, self.taken = 0, 0, {}, ()
        self._listening, self._hung = {}, set()
        self._lock = threading.RLock()
        self._wakes = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()

    def succeed(self):
        """The head is gone: what is here is for the next one."""
        self.epoch += 1
        with self._lock:
            self.found = {name: name.rpartition("-")[0] for name in self.instances}
            self.taken = list(self.found)
            self._listening.clear()

    def adopt(self, name):
        self.instances[name].succeed(self.epoch)
        return self._joined(name, self.instances[name].service)

    def leave(self):
        self.left = True

    def start(self, name, kind):
        started = Future()
        try:
            self.made += 1
            service = self.make(self.made, kind)
        except Exception as error:
            started.set_exception(error)
            return started
        instance = ServiceInstance(service, name, lambda: self._woken(name), observed=self.observed)
        with self._lock:
            self.instances[name] = instance
        return self._joined(name, service)

    def _joined(self, name, service):
        joined = Future()
        graphs = [graph for mount in service.models.values() for graph in graphs_of(mount)]
        place, models = f"here, {name}", tuple(service.models)
        joined.set_result(
            Joined("toy", place, self.made, tuple(graphs), dict(service.profiles), models, service.stages)
        )
        return joined

    def listen(self, name, now):
        news = Future()
        with self._lock:
            self._listening[name] = news
            if name not in self.instances:
                news.set_exception(ConnectionError("died"))
        self._woken(name)
        return news

    def describe(self, name, id, payload, slo):
        if name not in self.instances:
            return failed(ConnectionError("died"))
        return self.instances[name].describing.describe(id, payload, slo)

    def inspect(self, name, question):
        found = Future()
        try:
            found.set_result(through(through(question)(self.instances[name].service)))
        except Exception as error:
            found.set_exception(error)
        return found

    def check_room(self, counts):
        if sum(counts.values()) > 100:
            raise BackendError(f"{counts} are more than 100")

    def order(self, name, orders):
        instance = self.instances.get(name)
        if instance is not None and name not in self._hung:
            time.sleep(self.delay_s)
            instance.carry_out(through(orders))

    def pass_on(self, give):
        def pass_it():
            left = through(self.instances[give.instance].leave(give.id, give.term))
            target = self.instances[give.target]
            (target.copies.keep if give.keep else target.take)(give.id, give.next_term, left)

        return self._passed(pass_it)

    def restore(self, order):
        def pass_it():
            left = through(self.instances[order.instance].copies.get(order.id, order.term))
            self.instances[order.target].take(order.id, order.next_term, left)

        return self._passed(pass_it)

    def _passed(self, pass_it):
        passed = Future()
        try:
            pass_it()
        except Exception as error:
            passed.set_exception(error)
        else:
            passed.set_result(None)
        return passed

    def stop(self, name, why, *, kill):
        self.ended.append((name, why, kill))
        self.die(name)

    # -- what tests do ----------------------------------------------------------------------------

    def die(self, name):
        """An instance's process is dead, with all that it had not told yet."""
        with self._lock:
            instance = self.instances.pop(name, None)
            news = self._listening.pop(name, None)
        if instance is not None:
            instance.service.engine.interrupt()
        if news is not None and not news.done():
            news.set_exception(ConnectionError("died"))

    def hang(self, name):
        """Nothing goes to an instance any more, and nothing comes."""
        self._hung.add(name)

    def close(self):
        self._over.set()
        self._thread.join()
        for name in list(self.instances):
            self.die(name)

    # -- inside -----------------------------------------------------------------------------------

    def _woken(self, name):
        """On whatever thread, whose locks are not ours: the beat delivers."""
        self._wakes.put(name)

    def _deliver(self, name):
        with self._lock:
            instance, news = self.instances.get(name), self._listening.get(name)
            if instance is None or news is None or news.done() or name in self._hung:
                return
            try:
                found = instance.news()
            except EngineDied as error:
                news.set_exception(error)
                return
            if not found.news and not found.records:
                return
            del self._listening[name]
        news.set_result(through(found))

    def _beat(self):
        looked_at = 0.0
        while not self._over.is_set():
            with contextlib.suppress(queue.Empty):
                self._deliver(self._wakes.get(timeout=BEAT_S))
            if time.monotonic() - looked_at < BEAT_S:
                continue
            looked_at = time.monotonic()
            with self._lock:
                instances = list(self.instances.values())
            for instance in instances:
                instance.look()


def through(value):
    """What comes out at the other end of a wire."""
    return pickle.loads(pickle.dumps(value))


def failed(error):
    found = Future()
    found.set_exception(error)
    return found
