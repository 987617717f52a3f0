"""Members whose steps fail again and again: passed over, for how long, and what ends it."""

from __future__ import annotations

import pytest

from neustream import StageFailed
from neustream.engine.faults import MOST_KINDS, QUIET_S, Faults, Logged

LOST = StageFailed("lost")


def raised(error=None):
    """An error that knows where it was raised, behind what a stage came to if that is given."""
    try:
        raise KeyError("key")
    except KeyError as found:
        if error is None:
            return found
        error.__cause__ = found
        return error


def after(*results, stage="s", apart=0.0):
    faults = Faults("m")
    for at, result in enumerate(results):
        faults.ended(stage, result, at * apart)
    return faults


@pytest.mark.parametrize("lost", [LOST, KeyError("lost"), [LOST], [LOST, LOST]])
def test_three_steps_in_a_row_without_a_result(lost):
    assert not after(lost, lost).passed_over({"s"}, 0.0)
    faults = after(lost, lost, lost)
    assert faults.passed_over({"a", "s"}, 0.0) and faults.passed_over({"s"}, 0.999)
    assert not faults.passed_over({"s"}, 1.0), "and then it is tried again"
    assert not faults.passed_over({"a"}, 0.0), "other stages go on there"


@pytest.mark.parametrize("fruit", [[{}], [LOST, {"out": 1}]])
def test_one_result_ends_it(fruit):
    assert not after(LOST, LOST, fruit, LOST, LOST).passed_over({"s"}, 0.0)
    assert not after(*[LOST] * 9, fruit).passed_over({"s"}, 0.0)


@pytest.mark.parametrize(("rows", "seconds"), [(3, 1), (4, 2), (6, 8), (9, 64), (10, 64), (5000, 64)])
def test_each_try_that_fails_doubles_it_up_to_a_minute(rows, seconds):
    faults = after(*[LOST] * rows)
    assert faults.passed_over({"s"}, seconds - 0.001) and not faults.passed_over({"s"}, seconds)


@pytest.mark.parametrize("wrapped", ["itself", "all jobs", "each job"])
def test_where_a_stage_raised_is_logged_once_a_row(caplog, wrapped):
    lost = raised() if wrapped == "itself" else raised(StageFailed("lost"))
    lost = [LOST, lost] if wrapped == "each job" else lost
    after(lost, lost, [{}], lost, apart=QUIET_S)
    shown = [record for record in caplog.records if record.exc_info]
    assert len(shown) == 2 and "in raised" in caplog.text and "stage 's' failed" in caplog.text


def test_where_good_and_failing_steps_take_turns_one_failure_a_minute_is_logged(caplog):
    after(*[raised(), [{}]] * 3000, apart=QUIET_S / 1500)
    shown = [record for record in caplog.records if record.exc_info]
    assert len(shown) == len(caplog.records) == 4
    said = [record.getMessage() for record in shown]
    assert said[0] == "member 'm', stage 's' failed"
    assert {one.partition("; ")[2] for one in said[1:]} == {"749 more failures were not logged"}


def test_another_failure_and_another_stage_are_logged_at_once(caplog):
    faults = Faults("m")
    for stage, error in [("s", raised()), ("s", ValueError("other")), ("t", raised())]:
        faults.ended(stage, error, 0.0)
        faults.ended(stage, [{}], 0.0)
    assert [record.exc_info[0] for record in caplog.records] == [KeyError, ValueError, KeyError]


def test_a_stage_that_only_fails_is_told_of_once_a_minute(caplog):
    after(*[LOST] * 6000, apart=QUIET_S / 3000)
    told = [record.getMessage().partition("; ")[2] for record in caplog.records]
    for seconds in (1, 2, 4, 8, 16, 32):
        assert told.count(f"it is passed over for {seconds} s") == 1
    assert told.count("it is passed over for 64 s") == 2 and len(told) == 8


@pytest.mark.parametrize("apart", [0.0, QUIET_S / 1000, QUIET_S / 10])
@pytest.mark.parametrize("kinds", [1, MOST_KINDS, MOST_KINDS + 1, 10 * MOST_KINDS, 10**9])
def test_a_log_is_bounded_whatever_kinds_come_in_turn(apart, kinds):
    logged, said = Logged(), []
    for at in range(5000):
        unsaid = logged.may(at % kinds, at * apart)
        if unsaid is not None:
            said.append((at * apart, unsaid))
    for since, _ in said:
        assert len([at for at, _ in said if since <= at < since + QUIET_S]) <= MOST_KINDS + 1
    assert len(logged._kinds) <= MOST_KINDS
    assert len(said) + sum([unsaid for _, unsaid in said]) <= 5000, "none is told of twice"


def test_kinds_that_there_is_no_room_for_are_one_kind_together():
    logged = Logged()
    assert [logged.may(kind, 0.0) for kind in range(MOST_KINDS)] == [0] * MOST_KINDS
    assert [logged.may(kind, 1.0) for kind in ("a", "b", "c", "a")] == [0, None, None, None]
    assert logged.may(0, 1.0) is None, "those that are known are still told apart"
    assert logged.may("d", QUIET_S) == 0, "the first of them is old by now, and makes room"
    for kind in range(1, MOST_KINDS):
        assert logged.may(kind, QUIET_S) == 0
    assert logged.may("e", QUIET_S + 1.0) == 4, "three of other kinds, and one of the kind that made room"


def test_what_says_all_by_itself_is_not_logged_with_frames(caplog):
    after(LOST, [LOST], [{}], StageFailed("its step did not come back"))
    assert not [record for record in caplog.records if record.exc_info]
