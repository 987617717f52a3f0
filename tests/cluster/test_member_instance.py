"""An instance's side by hand: orders in, what is done and said out."""

from __future__ import annotations

import pytest
from clusters import GRAPH, PROFILES, STREAM

from neustream import FCFS, SLO, Pool, Scheduler
from neustream.cluster import messages as say
from neustream.cluster.member_instance import MemberInstance
from neustream.cluster.reporting import Reporting
from neustream.core.rates import Rates
from neustream.engine.clock import VirtualClock
from neustream.engine.events import Call
from neustream.engine.executor import ProfiledExecutor
from neustream.engine.loop import Loop
from neustream.engine.member import Member
from neustream.engine.routing import LeastWork
from neustream.errors import StageFailed

GRAPHS = {"image": GRAPH, "stream": STREAM}


class Bench:
    """A member with an instance; what the instance says is in `said`."""

    def __init__(
        self, offset_s: float = 0.0, executor: ProfiledExecutor | None = None, reporting: Reporting | None = None
    ) -> None:
        scheduler = Scheduler([Pool("gpu", tuple(PROFILES))], FCFS(drop_hopeless=False), PROFILES)
        member = Member(scheduler, {"gpu": executor or ProfiledExecutor()}, "a")
        self.clock = VirtualClock()
        self.loop = Loop([member], self.clock, LeastWork())
        self.said: list[tuple[str, object]] = []
        drive = self.loop.drives[0]
        send = lambda to, message: self.said.append((to, message))  # noqa: E731
        options = {"offset_s": offset_s, "reporting": reporting}
        self.instance = MemberInstance("a", self.loop, drive, GRAPHS, Rates(PROFILES), send, **options)
        self.loop.observers.append(self.instance.noted)
        self.jobs = scheduler.jobs

    def do(self, *orders: object) -> list[object]:
        """Carry out orders at once; what was said of requests."""
        for order in orders:
            self.instance.receive(order, self.clock.now())
        return self.turn([])

    def turn(self, events: list) -> list[object]:
        for event in events:
            self.loop.handle(event)
        touched, self.loop._touched = self.loop._touched, {}
        for drive in touched:
            drive.turn()
        self.loop.publish()
        return self.heard()

    def step(self) -> list[object]:
        """Let the next thing happen, beside that it tells how it is."""
        heard: list[object] = []
        while True:
            events = self.clock.wait()
            heard += self.turn(events)
            if [event for event in events if event != Call(self.instance.tell, rank=4)]:
                return heard

    def heard(self) -> list[object]:
        said, self.said = self.said, []
        return [message for _, message in said if not isinstance(message, say.Told)]


def begin(id="r", term=1, graph="stream", age=0.0, sent_at=0.0, slo=None, made=()) -> say.Send:
    return say.Send("a", id, term, graph, slo or SLO(), {"steps": 3}, age, sent_at, term, made)


def test_a_request_is_taken_begun_and_told_of_to_its_end():
    bench = Bench()
    assert bench.do(begin()) == [say.Took("r", 1), say.Began("r", 1)]
    heard = []
    while bench.jobs:
        heard += bench.step()
    assert heard[:3] == [say.Made("r", 1, index, {}) for index in range(3)]
    assert isinstance(heard[3], say.Over) and (heard[3].status, heard[3].outputs) == ("done", 3)


@pytest.mark.parametrize("order", [begin(graph="audio"), begin(slo=None, graph="image", term=1)])
def test_what_cannot_be_served_is_refused(order):
    bench = Bench()
    if order.graph == "audio":
        assert bench.do(order) == [say.Refused("r", 1, "instance 'a' has no graph 'audio'")]
        return
    broken = say.Send("a", "r", 1, "image", SLO(), {}, 0.0, 0.0, 1)
    (refused,) = bench.do(broken)
    assert isinstance(refused, say.Refused) and "'steps'" in refused.reason and not bench.jobs


def test_repeated_and_overtaken_orders_change_nothing():
    bench = Bench()
    bench.do(begin(term=2))
    assert bench.do(begin(term=2), begin(term=1)) == []
    assert bench.do(say.Hold("a", "r", 1), say.Resume("a", "r", 1), say.Cancel("a", "r", 1)) == []
    assert bench.do(say.Free("a", "r", 1)) == [] and "r" in bench.jobs
    bench.do(say.Free("a", "gone", 5))
    assert bench.do(begin("gone", term=5)) == [] and "gone" not in bench.jobs
    assert say.Took("gone", 6) in bench.do(begin("gone", term=6))


def test_a_request_that_comes_back_while_its_old_term_is_in_a_step_waits_for_that():
    bench = Bench()
    bench.do(begin())
    assert bench.do(say.Free("a", "r", 1), begin(term=2)) == []
    heard = bench.step()
    while say.Took("r", 2) not in heard:
        heard += bench.step()
    assert not any(isinstance(one, say.Over | say.Made) for one in heard), "nobody hears of term 1"


def test_a_request_that_waits_for_its_old_term_can_be_cancelled_or_freed():
    for order in (say.Cancel("a", "r", 2), say.Free("a", "r", 2)):
        bench = Bench()
        bench.do(begin())
        bench.do(say.Free("a", "r", 1), begin(term=2))
        said = bench.do(order)
        assert [one.status for one in said] == (["cancelled"] if isinstance(order, say.Cancel) else [])
        bench.step()
        assert not bench.jobs


def test_a_request_that_goes_on_behind_its_outputs_takes_alone_what_it_took_from_its_start():
    """`neustream` divides by it."""
    bench = Bench()
    bench.do(begin("new"), begin("on", made=({},)))
    assert bench.jobs["on"].alone_s == pytest.approx(bench.jobs["new"].alone_s) and bench.jobs["on"].alone_s > 0


def test_a_held_request_is_given_as_a_copy_and_kept_until_it_is_freed():
    bench = Bench()
    bench.do(begin())
    bench.do(say.Hold("a", "r", 1))
    heard = bench.step()
    assert heard == [say.Made("r", 1, 0, {}), say.Waits("r", 1, left={"frame": 2})]
    bench.do(say.Give("a", "r", 1, "b", 2))
    bench.instance.receive(say.Give("a", "r", 1, "b", 2), 0.0)
    ((to, parcel),) = [(to, one) for to, one in bench.said if to != say.HEAD]
    assert (to, parcel.term, parcel.carry.outputs) == ("b", 2, 1) and "r" in bench.jobs
    assert bench.do(say.Resume("a", "r", 1)) and bench.jobs["r"].status == "running"


def test_a_parcel_goes_on_where_it_was_unless_it_was_freed_before():
    source, target, late = Bench(), Bench(), Bench()
    source.do(begin())
    source.do(say.Hold("a", "r", 1))
    source.step()
    source.instance.receive(say.Give("a", "r", 1, "b", 2), source.clock.now())
    (parcel,) = [one for _, one in source.said if isinstance(one, say.Parcel)]
    assert say.Took("r", 2) in target.do(say.Reserve("a", "r", 2, 1, 0.0), parcel)
    assert say.Made("r", 2, 1, {}) in target.step()
    assert late.do(say.Free("a", "r", 2), parcel) == [] and not late.jobs


def test_what_an_executor_cannot_part_with_stays():
    class Tight(ProfiledExecutor):
        def export(self, input, worker=0):
            raise StageFailed("Sampler keeps it")

    bench = Bench(executor=Tight())
    bench.do(begin())
    bench.do(say.Hold("a", "r", 1))
    bench.step()
    assert bench.do(say.Give("a", "r", 1, "b", 2)) == [say.Refused("r", 1, "not movable: Sampler keeps it")]
    assert bench.jobs["r"].status == "held"


def test_a_fence_forgets_all():
    bench = Bench()
    bench.do(begin("r"), begin("s"), say.Reserve("a", "t", 1, 9, 0.0))
    assert bench.do(say.Fence("a")) == [say.Fenced()]
    while bench.jobs:
        assert bench.step() == []
    assert bench.do(say.Ask("a")) == [say.Here(())]


def test_clocks_of_other_machines_do_not_matter():
    """The cluster's clock is 1000 s ahead: the request came 0.5 s ago, before this engine began."""
    bench = Bench(offset_s=1000.0)
    bench.do(begin(age=0.5, sent_at=1000.0, slo=SLO(total=2.0)))
    assert bench.jobs["r"].due == pytest.approx(1.5)
    bench.instance.tell(0.25)
    assert [one.outlook.sent_at for _, one in bench.said if isinstance(one, say.Told)] == [1000.25]
    (refused,) = bench.do(begin("late", age=3.0, sent_at=1000.0, slo=SLO(total=2.0)))
    assert refused.reason == "its promise was over 1.000 s ago"


@pytest.mark.parametrize(("slow", "instants"), [(1.0, [0.0, 0.4]), (1.4, [0.0, 0.44]), (2.0, [0.0, 0.3, 0.5])])
def test_how_it_is_goes_with_what_it_says_and_with_steps_that_take_much_longer(slow, instants):
    """Of the steps of a loop only the second takes `slow` times as long as it should."""
    times = iter([1.0, slow, 1.0, 1.0])
    bench = Bench(executor=ProfiledExecutor(stretch=lambda batch: next(times)))
    bench.do(begin(graph="image"))
    while bench.jobs:
        bench.loop.turn(bench.clock.wait())
    bench.loop.turn(bench.clock.wait())
    told = [message.outlook.sent_at for _, message in bench.said if isinstance(message, say.Told)]
    assert told == pytest.approx(instants)
