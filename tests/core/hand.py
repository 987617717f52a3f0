"""A policy that does what a test tells it, and shows the test what policies see."""

from __future__ import annotations

from collections.abc import Callable

from neustream import Decision, View


class Hand:
    """Decides by `choose`, which the test sets; keeps the last view. Without one it waits a second."""

    def __init__(self, choose: Callable[[View], Decision] | None = None) -> None:
        self.choose = choose or (lambda view: Decision(wake_at=view.now + 1.0))
        self.view: View | None = None

    def decide(self, view: View) -> Decision:
        self.view = view
        return self.choose(view)


def seen(scheduler, now=0.0, worker=0, pool="gpu"):
    """What a policy is shown there and then."""
    hand = Hand()
    set_policy(scheduler, hand)
    scheduler.next_batch(pool, now, worker)
    return hand.view


def policy_in(scheduler):
    """The policy of its pools; the same for all."""
    (policy,) = {id(policy): policy for policy in scheduler.policies.values()}.values()
    return policy


def set_policy(scheduler, policy):
    """Let `policy` decide for all pools from now on."""
    for state in scheduler._pools.values():
        state.policy = policy


def ids(jobs):
    return [job.id for job in jobs]
