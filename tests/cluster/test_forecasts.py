"""Forecasts against the plans that they are short for."""

from __future__ import annotations

import pytest
from clusters import PROFILES, busy, head_of, request
from hypothesis import event, given, settings
from hypothesis import strategies as st

from neustream import SLO, LinearProfile
from neustream.cluster.book import asked_of
from neustream.core.demand import Calls
from neustream.core.forecasts import forecast
from neustream.core.outlook import FOREVER, Asked, LineOutlook, Outlook, TextOutlook
from neustream.core.policies.feasibility import Line
from neustream.core.rates import Rates
from neustream.core.steps import StepProfile
from neustream.graphs import llm_profiles

RATES = Rates(PROFILES)
BEHIND = 0.1
JOBS = st.lists(st.tuples(st.integers(1, 30), st.floats(0.5, 20.0)), max_size=6)


def there(jobs: list[tuple[int, float]], until: float, speed: float) -> Outlook:
    """An instance with requests of so many steps, each with so many times as long as it takes alone."""
    rows = sorted((float(steps), steps * 0.1 * spare, BEHIND, 1.0) for steps, spare in jobs)
    lines = (LineOutlook("step", *zip(*rows, strict=True)),) if rows else ()
    return Outlook("a", 0.0, 0, until, 1.0, len(jobs), 0, lines, (), {"step": speed})


def planned(outlook: Outlook, asked: Asked, age: float) -> tuple[bool, float]:
    """Whether all fit, and when it ends, by both plans of `Line`."""
    speed, count = outlook.speed["step"], float(asked.calls["step"].count)
    curve = RATES.curve("step", asked.calls["step"].max_batch)
    rows = []
    for line in outlook.lines:
        turn = speed * curve.turn_list(len(line.left))[len(line.left)]
        columns = zip(line.left, line.due_in, line.behind, strict=True)
        rows = [(max(left - age / turn, 0.0), due - age, behind) for left, due, behind in columns]
    place = sum(left <= count for left, _, _ in rows)
    rows.insert(place, (count, min(asked.due_in, FOREVER) - BEHIND, BEHIND))
    left, due, behind = map(list, zip(*rows, strict=True))
    until = max(outlook.until - age, 0.0)
    line = Line(until, curve, speed, left, due, behind, [0.0] * len(rows), [1.0] * len(rows))
    everyone = list(range(len(rows)))
    seats = 0 if line.in_turns(everyone) else line.seats(everyone)
    event("seats" if seats else "turns" if line.in_turns(everyone) else "does not fit")
    if not seats:
        return line.in_turns(everyone), line.turn_ends(everyone, 0.0)[place][1]
    by_deadline = sorted(everyone, key=due.__getitem__)
    ends = dict(zip(by_deadline, line.seat_ends(everyone, 0.0, seats), strict=True))
    return True, ends[place][1]


@settings(max_examples=300, deadline=None)
@given(JOBS, st.integers(1, 30), st.floats(0.9, 9.0), st.sampled_from([0.0, 0.15, 2.0]), st.sampled_from([1.0, 1.5]))
def test_a_forecast_says_what_turns_and_seats_do(jobs, steps, spare, age, speed):
    outlook = there(jobs, 0.1, speed)
    asked = asked_of(request("new", slo=SLO(total=steps * 0.1 * spare + BEHIND), steps=steps))
    said = forecast(outlook, asked, RATES, age)
    fits, end = planned(outlook, asked, age)
    assert (said.fits, said.finish) == (fits, pytest.approx(end))


def test_one_with_a_seat_ends_by_its_own_deadline_and_not_by_the_place_of_its_steps():
    """Four loose requests of 40 steps and a tight one of 5: the tight one goes first, in small batches."""
    outlook = there([(40, 8.0)] * 4, 0.0, 1.0)
    asked = asked_of(request("new", slo=SLO(total=1.2), steps=5))
    said = forecast(outlook, asked, RATES, 0.0)
    assert said.fits and said.finish < 1.2


def test_a_fleet_asks_each_kind_of_device_its_own_question():
    head = head_of("a", "b")
    head.joined("old", 0.0, stages=tuple(PROFILES), device="slow")
    head.joined("front", 0.0, stages=("step",))
    fleet = head.fleet
    for name in ("a", "b", "old", "front"):
        fleet.told(fleet.instances[name], busy(name, 3 if name == "b" else 1, 60.0))
    for steps in (5, 8):
        one = asked_of(request("r", slo=SLO(total=9.0), steps=steps))
        ends = {name: fleet.ask(instance, one).finish for name, instance in fleet.instances.items()}
        for name in ("a", "b", "old"):
            instance = fleet.instances[name]
            alone = forecast(instance.outlook, one, fleet.rates[instance.device], 0.0)
            assert ends[name] == alone.finish
        assert ends["front"] == pytest.approx(ends["a"] - 0.1), "its decode is elsewhere"


@pytest.mark.parametrize("prompts", [0, 3, 4, 40])
def test_a_text_behind_more_prompts_than_run_in_a_step_has_a_forecast(prompts):
    steps = StepProfile("m", *[LinearProfile(name, base=0.1, per_size=1e-3, max_batch=4) for name in ("p", "d")])
    rates = Rates(llm_profiles("m", steps, 4))
    text = TextOutlook("m", prompts=prompts, prompt_tokens=50.0 * prompts)
    outlook = Outlook("a", 0.0, 0, 0.0, 1.0, prompts, 0, (), (text,))
    calls = {"m.prefill": Calls(1, False, 4, 50.0), "m.decode": Calls(9, True, 4, 50.0)}
    said = forecast(outlook, Asked("r", calls, "m.prefill", 20.0, 1.0, tokens=50.0), rates, 0.0)
    assert said.first == pytest.approx(0.1 + 0.05 * (prompts + 1)) and said.fits == (prompts < 18)
