"""How long an instance goes on without a head, by a clock of the tests."""

from __future__ import annotations

from neustream.backends.ray.lease import Lease


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def looks(lease, clock, seconds, pause_s=1.0):
    """Pauses of the one that watches, until the lease is over or so many seconds have passed."""
    until = clock.now + seconds
    while clock.now < until:
        clock.now += pause_s
        if lease.ended(pause_s):
            return True
    return False


def test_it_ends_when_no_head_is_heard_for_so_long():
    clock = Clock()
    lease = Lease(8.0, clock)
    assert not looks(lease, clock, 8.0) and looks(lease, clock, 1.0)


def test_a_head_that_speaks_keeps_it():
    clock = Clock()
    lease = Lease(8.0, clock)
    for _ in range(5):
        assert not looks(lease, clock, 7.0)
        lease.heard()
    assert looks(lease, clock, 9.0)


def test_time_in_which_no_thread_ran_is_no_silence():
    """`make` holds Python's lock for three leases; the head's calls are read only after that."""
    clock = Clock()
    lease = Lease(8.0, clock)
    assert not looks(lease, clock, 4.0)
    clock.now += 24.0
    assert not lease.ended(1.0), "it could hear for 5 of 8 seconds"
    assert not looks(lease, clock, 3.0) and looks(lease, clock, 1.0)


def test_who_wakes_up_a_little_late_each_time_ends_all_the_same():
    clock = Clock()
    lease = Lease(8.0, clock)
    for _ in range(8):
        clock.now += 1.05
        over = lease.ended(1.0)
    assert over
