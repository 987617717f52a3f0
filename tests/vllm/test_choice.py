"""What becomes of a policy's decision: a choice, and the queues that vLLM sees during a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from fake_vllm import FakeRequest, builder

from neustream.backends.vllm.choice import Choice, Room, arrange, ask, put_back
from neustream.core.policy import Decision
from neustream.errors import PolicyError


@dataclass(frozen=True)
class Rule:
    """Decides by a function of the jobs by id."""

    of: Any

    def decide(self, view):
        return self.of({job.id: job for job in view.jobs})


@pytest.fixture
def view():
    decodes = FakeRequest("d", 20, 10, status="running", num_computed_tokens=22, num_output_tokens=3)
    requests = {"d": decodes, "p": FakeRequest("p", 50), "q": FakeRequest("q", 30)}
    return builder(max_batch=2).build(requests, {}, 50, 100.0)


# -- asking -----------------------------------------------------------------------------------------


def test_a_decision_becomes_tokens_by_id_in_its_order(view):
    rule = Rule(lambda jobs: Decision([jobs["p"], jobs["d"]], sizes={jobs["p"]: 12.7}))
    assert ask(rule, view) == Choice({"p": 12, "d": 1}, frozenset("p"))
    assert ask(Rule(lambda jobs: Decision([jobs["q"]])), view) == Choice({"q": 30})


def test_drops_come_with_their_reasons(view):
    choice = ask(Rule(lambda jobs: Decision([jobs["d"]], {jobs["p"]: "hopeless"})), view)
    assert choice == Choice({"d": 1}, drop={"p": "hopeless"})
    everyone = ask(Rule(lambda jobs: Decision(drop=dict.fromkeys(jobs.values(), "late"))), view)
    assert everyone.drop == dict.fromkeys("dpq", "late") and not everyone.tokens


def test_a_policy_may_wait(view):
    assert ask(Rule(lambda jobs: Decision(wake_at=101.0)), view) == Choice()


def test_while_a_step_is_in_flight_all_may_wait_for_it(view):
    assert ask(Rule(lambda jobs: Decision()), view, in_flight=True) == Choice()


def test_nobody_is_asked_about_nobody():
    assert ask(Rule(lambda jobs: 1 / 0), builder().build({}, {}, 50, 0.0)) == Choice()


@pytest.mark.parametrize(
    "rule, says",
    [
        (lambda jobs: Decision([jobs["d"], jobs["d"]]), "chose a job twice"),
        (lambda jobs: Decision([jobs["d"]], {jobs["d"]: "late"}), "and dropped it"),
        (lambda jobs: Decision([*jobs.values()], sizes={jobs["p"]: 0}), "share of 0"),
        (lambda jobs: Decision(), "left 3 job.s. of pool 'vllm' waiting for ever"),
        (lambda jobs: Decision(drop={jobs["d"]: "late"}), "left 2 job.s."),
        (lambda jobs: Decision(wake_at=100.0), "which is not after 100.0"),
        (lambda jobs: None, "policy 'Rule' raised AttributeError"),
        (lambda jobs: 1 / 0, "policy 'Rule' raised ZeroDivisionError: division by zero"),
        (lambda jobs: Decision(["d"]), "policy 'Rule' raised AttributeError"),
    ],
)
def test_faults_of_a_policy_are_named(view, rule, says):
    with pytest.raises(PolicyError, match=says):
        ask(Rule(rule), view)


def test_who_is_not_in_the_view_cannot_be_chosen(view):
    other = builder().build({"x": FakeRequest("x")}, {}, 50, 100.0).jobs[0]
    for decision in (Decision([other]), Decision(drop={other: "late"})):
        with pytest.raises(PolicyError, match=r"not runnable|not waiting"):
            ask(Rule(lambda jobs, decision=decision: decision), view)


# -- arranging --------------------------------------------------------------------------------------

ROOM = Room(seats=4, blocks=50, block_size=16, step_tokens=64)


def queue(ids, computed=0):
    return [FakeRequest(id, num_computed_tokens=computed) for id in ids]


def names(requests):
    return "".join(request.request_id for request in requests)


def told(plan):
    return names(plan.running), names(plan.apart), names(plan.waiting), plan.tokens


def test_who_is_not_chosen_is_kept_out():
    plan = arrange(Choice({"c": 1, "a": 1, "y": 20}), queue("abc", 20), queue("xyz"), queue("g"), ROOM)
    assert told(plan) == ("ca", "b", "yg", 1 + 1 + 20 + 1)
    assert plan.chosen


def test_a_part_of_a_prompt_comes_behind_the_others():
    choice = Choice({"a": 5, "b": 1, "x": 5, "y": 9}, frozenset("ax"))
    assert told(arrange(choice, queue("ab", 20), queue("xy"), [], ROOM)) == ("ba", "", "yx", 20)


def test_a_step_has_no_more_tokens_than_vllm_gives_it():
    assert arrange(Choice({"x": 60, "y": 60}), [], queue("xy"), [], ROOM).tokens == 64


def test_who_waits_on_purpose_runs_nothing():
    plan = arrange(Choice(), queue("ab", 20), queue("x"), queue("g"), ROOM)
    assert told(plan) == ("", "ab", "g", 1) and not plan.chosen


def test_where_no_seat_is_free_and_nobody_goes_on_anyone_may_run():
    full = Room(seats=0, blocks=50, block_size=16, step_tokens=64)
    assert arrange(Choice({"x": 20}), queue("ab", 20), queue("x"), [], full) is None
    assert arrange(Choice(), queue("ab", 20), queue("x"), [], full) is None
    assert arrange(Choice({"x": 20, "a": 1}), queue("ab", 20), queue("x"), [], full) is not None


def test_short_of_blocks_those_left_out_stay_to_be_preempted():
    """a needs a third block; b, which is not chosen, is behind it, and beyond the step's tokens."""
    short = Room(seats=4, blocks=0, block_size=16, step_tokens=64)
    choice = Choice({"a": 1, "x": 20})
    assert told(arrange(choice, queue("ba", 32), queue("x"), queue("g"), short)) == ("ab", "", "", 1)
    assert told(arrange(choice, queue("ba", 31), queue("x"), queue("g"), short)) == ("a", "b", "xg", 22)


def test_the_waiting_queue_comes_back_as_it_was():
    a, b, c, d, p = queue("abcdp")
    assert put_back([a, b, c, d], [c, a], [p, a]) == [p, a, b, d]
    assert put_back([a, b], [], []) == [a, b]
