"""Who is taken in by what it adds to the number of generations that are expected to be on time."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hand import Hand, ids, seen
from texts_by_hand import STAGES, STEPS, ask, decided, scheduler_with

from neustream import EDF, FCFS, Decision, Priced
from neustream.core.lengths import Lengths
from neustream.core.observed import Ratios
from neustream.core.policies.model_queues import model_queues
from neustream.core.policies.newcomers import WORTH, Newcomers
from neustream.core.policies.on_time import DOOMED, Outlook, chances, expectations
from neustream.core.steps import Step

# -- lengths and errors ------------------------------------------------------------------------------


def test_lengths_that_nobody_saw_are_of_every_order_of_magnitude_up_to_the_maximum():
    lengths = Lengths()
    outputs, points = np.array([0.0, 512.0]), np.array([0.0, 8.0, 64.0, 512.0])
    assert lengths.ahead(outputs, points) == pytest.approx(np.ones((2, 4)))  # without one all go on
    expected = lengths.ahead(np.array([0.0]), points, 4096.0)[0]
    # an eighth fills it; of the others 1/4, 2/4, 3/4 are shorter than 8, 64, 512: powers of 8
    assert expected == pytest.approx([1 / 8 + 7 / 8 * left for left in (1, 3 / 4, 2 / 4, 1 / 4)])
    for _ in range(500):
        for reached in range(1, 41):
            lengths.reached(reached)
        lengths.ended(40, 4096)
    assert lengths.ahead(np.array([0.0]), np.array([32.0, 80.0]), 4096.0)[0] == pytest.approx([1, 0], abs=0.1)


def test_lengths_far_beyond_those_that_came_so_far_are_guessed_alike():
    """The first answers are under way: how many come to thousands of outputs is guessed as for short ones."""
    lengths = Lengths()
    expected = lengths.ahead(np.array([0.0]), np.array([1024.0, 2048.0]), 4096.0)[0]
    assert expected == pytest.approx([1 / 8 + 7 / 8 * left for left in (2 / 12, 1 / 12)], abs=0.001)
    for _ in range(50):
        for reached in range(1, 501):
            lengths.reached(reached)
    before, after = lengths.ahead(np.array([500.0]), np.array([500.0, 1500.0]), 4096.0)[0]
    assert 0.85 > before > after + 0.1
    huge = lengths.survival(2.0**17)
    assert len(huge) < 400 and huge[-1] > 0.1  # not a bin for each of so many


def test_generations_that_go_on_speak_against_short_lengths_before_any_ended():
    lengths = Lengths()
    guessed = lengths.ahead(np.array([0.0]), np.array([64.0, 512.0]), 4096.0)[0]
    for _ in range(50):
        for reached in range(1, 101):
            lengths.reached(reached)
    seen = lengths.ahead(np.array([0.0]), np.array([64.0, 512.0]), 4096.0)[0]
    assert seen[0] > 0.97 > guessed[0]
    assert 0.9 > seen[1] > guessed[1]  # of what comes behind 100 they say nothing


def test_where_maxima_are_filled_nobody_is_guessed_to_end_before():
    short, full = Lengths(), Lengths()
    for _ in range(30):
        short.ended(1, 4096)
        full.full(4096)
    points = np.array([512.0])
    assert full.ahead(np.array([64.0]), points, 4096.0)[0, 0] > 0.97
    assert short.ahead(np.array([64.0]), points, 4096.0)[0, 0] == pytest.approx(0.5, abs=0.05)  # 3 of 6 powers left


def test_the_error_is_the_median_distance_to_the_typical_ratio():
    ratios = Ratios()
    assert ratios.error == 0
    for _ in range(16):
        ratios.add(1.5)
    assert ratios.error == 0
    for ratio in (1.2, 1.5, 1.8) * 40:
        ratios.add(ratio)
    assert ratios.error == pytest.approx(0.2, abs=0.01)


def test_prompts_that_met_slow_phases_do_not_make_decodes_look_slow():
    """A block of the rare steps with prompts spans phases: its mean is that of none of them."""
    scheduler = scheduler_with(running=[ask("a", first=9.0)], waiting=[ask("b", first=9.0)])
    prompts, decodes = Ratios(), Ratios()
    for ratio in (1.0, 1.0, 3.0) * 20:
        prompts.add(ratio)
    for _ in range(60):
        decodes.add(1.25)
    assert prompts.usual > 1.3
    spread = {"llm.prefill": prompts, "llm.decode": decodes}
    speed = {name: ratios.usual for name, ratios in spread.items()}
    model = model_queues(dataclasses.replace(seen(scheduler), spread=spread, speed=speed), "llm")
    decode, prompt = Step(decodes=1, context=20.0), Step(1, 100.0, 1e4)
    assert model.seconds(decode) == pytest.approx(1.25 * STEPS.seconds(decode))
    assert model.seconds(prompt) == pytest.approx(STEPS.seconds(prompt))


def test_prompts_of_which_too_few_were_seen_take_as_long_as_decodes_say():
    scheduler = scheduler_with(running=[ask("a", first=9.0)], waiting=[ask("b", first=9.0)])
    prompts = Ratios()
    prompts.add(3.0)
    speed = {"llm.prefill": prompts.usual, "llm.decode": 1.5}
    spread = {"llm.prefill": prompts, "llm.decode": Ratios()}
    model = model_queues(dataclasses.replace(seen(scheduler), spread=spread, speed=speed), "llm")
    assert (model.speed, model.prompt_speed) == (1.5, 1.5)


# -- promises that are hopeless, and that are not ----------------------------------------------------


@pytest.mark.parametrize("policy", [EDF(), FCFS(drop_hopeless=True), Priced()])
def test_a_maximum_makes_no_promise_hopeless_on_an_idle_device(policy):
    scheduler = scheduler_with(waiting=[ask("a", most=5000, total=2.0)])
    assert decided(scheduler, policy=policy) == ({"a"}, set())


def test_a_promise_is_hopeless_where_generations_usually_get_too_long():
    ends = [200] * 40
    waiting = [ask("long", most=5000, total=1.0), ask("short", most=50, total=1.0)]
    scheduler = scheduler_with(waiting=waiting, ends=ends)
    assert decided(scheduler, policy=EDF()) == ({"short"}, {"long"})


def test_the_next_output_has_to_be_in_time_whatever_is_known():
    scheduler = scheduler_with(waiting=[ask("a", prompt=900, most=5000, total=0.05)])
    assert decided(scheduler, policy=EDF()) == (set(), {"a"})


# -- who is taken in ---------------------------------------------------------------------------------


def test_totals_with_lengths_never_seen_are_taken_in_together():
    waiting = [ask(f"r{at}", most=2000, total=60.0) for at in range(10)]
    running, drop = decided(scheduler_with(waiting=waiting))
    assert running == {f"r{at}" for at in range(10)} and not drop


def test_one_that_can_hardly_be_on_time_keeps_nobody_out():
    strict = ask("strict", most=1000, first=0.02, step=0.0101)  # alone it decodes in 0.011
    newcomer = ask("new", most=200, arrival=0.01, first=1.0, step=0.5)
    scheduler = scheduler_with([strict], [newcomer], now=0.01, ends=[300] * 50)
    running, drop = decided(scheduler, 0.01)
    assert "new" in running and not drop


@pytest.mark.parametrize(("slo", "gone"), [({"total": 1.1}, set()), ({"first": 0.3, "step": 0.008}, {"r"})])
def test_a_small_chance_is_kept_where_no_output_is_due_that_holds_others_back(slo, gone):
    """One in a hundred ends within the hundred outputs that there is time for."""
    scheduler = scheduler_with([ask("r", most=300, **slo)], ends=[20] * 4 + [200] * 400)
    model = model_queues(seen(scheduler, 0.0), "llm")
    outlook = Outlook(expectations(model, 300, margin=0.0, units=math.inf, block=0), model.decodes)
    assert set(ids(outlook.shed_doomed())) == gone


def test_strict_ones_that_are_refused_do_not_hide_lax_ones():
    ends = [150] * 200
    running = [ask(f"r{at}", first=0.53, step=0.025) for at in range(12)]
    strict = [ask(f"strict{at}", prompt=10, arrival=0.5, first=0.2, step=0.012) for at in range(8)]
    lax = ask("lax", prompt=60, arrival=0.5, first=9.0, step=1.0)
    scheduler = scheduler_with(running, [*strict, lax], now=0.5, ends=ends)
    chosen, _ = decided(scheduler, 0.5)
    assert "lax" in chosen
    assert not any(id.startswith("strict") for id in chosen)


def test_a_newcomer_that_costs_more_than_it_brings_waits_unless_it_weighs_more():
    ends = [150] * 200
    running = [ask(f"r{at}", first=0.53, step=0.0251, most=300) for at in range(15)]  # 15 decode in 0.025

    def chosen(weight):
        new = ask("new", arrival=0.5, first=5.0, step=0.0265, weight=weight)
        return decided(scheduler_with(running, [new], now=0.5, ends=ends), 0.5)[0]

    assert "new" not in chosen(1)
    assert "new" not in chosen(0.001)
    assert "new" in chosen(1000)


def test_a_total_whose_usual_length_fills_its_time_keeps_no_prompt_out_of_a_step():
    running = [ask(f"r{at}", most=2000, total=1.32) for at in range(2)]  # a prompt costs the usual time
    new = ask("new", prompt=100, total=8.0)
    assert "new" in decided(scheduler_with(running, [new], ends=range(4, 204, 4)))[0]


def test_a_prompt_does_not_join_a_step_in_which_its_own_output_is_late():
    running = [ask(f"r{at}", first=1.0, step=1.0) for at in range(20)]  # they decode in 0.03
    new = ask("new", prompt=20, first=0.02)  # alone in 0.012
    assert decided(scheduler_with(running, [new])) == ({"new"}, set())


def test_what_is_kept_for_noise_is_for_others_and_keeps_no_prompt_out_that_its_own_step_may_make_late():
    """Steps miss by a third. Alone it takes 0.012: where it waits for a shorter step it is surely late."""
    spread = Ratios(64)
    for _ in range(8):
        for ratio in (0.67, 1.0, 1.33, 1.0, 0.67, 1.33):
            spread.add(ratio)
    assert spread.error == pytest.approx(0.33)

    def decision(step):
        running = [ask(f"r{at}", first=0.02, step=step) for at in range(20)]
        scheduler = scheduler_with(running, [ask("new", prompt=20, first=0.014)])
        view = dataclasses.replace(seen(scheduler), spread=dict.fromkeys(STAGES, spread))
        return ids(Priced().decide(view).jobs)

    assert decision(1.0) == ["new"]
    assert "new" not in decision(0.031)  # the others take 0.03 after it, and are due in 0.051


def test_a_total_is_not_left_waiting_for_hurried_prompts_until_its_end():
    """Beside requests that cannot wait for a step, decodes with slack pause: not where outputs are to come."""
    hurried = [ask(f"g{at}", prompt=20, most=1, first=0.014) for at in range(4)]

    def decision(most):
        slow = ask("slow", most=most, total=5.0)
        return Priced().decide(seen(scheduler_with([slow, *hurried]), 0.0))

    assert ids(decision(1000).jobs)[:1] == ["slow"]
    assert 3.0 < decision(100).wake_at < 5.0 - 99 * 0.011  # time for all of them


def test_memory_that_may_not_suffice_refuses_nobody_who_can_wait_for_it():
    running = [ask(f"r{at}", prompt=30, most=2000, first=2.0, step=2.0) for at in range(4)]
    new = ask("new", prompt=30, most=2000, arrival=0.1, first=2.0, step=2.0)
    scheduler = scheduler_with(running, [new], now=0.1, ends=[400] * 50, blocks=100)  # 1,600 tokens
    assert "new" in decided(scheduler, 0.1)[0]


@pytest.mark.parametrize(("first", "comes"), [(0.5, True), (60.0, False)])
def test_where_memory_is_short_the_urgent_come_before_the_short(first, comes):
    urgent = ask("urgent", prompt=100, first=first, step=1.0)
    lax = [ask(f"lax{at}", prompt=90, first=30.0, step=1.0) for at in range(6)]
    scheduler = scheduler_with(waiting=[urgent, *lax], ends=[100] * 50, blocks=20)  # three prompts
    assert ("urgent" in decided(scheduler)[0]) == comes


def test_who_was_promised_a_first_output_keeps_no_block_from_others_once_it_came():
    running = [ask(f"r{at}", prompt=32, most=100, first=1.0) for at in range(4)]  # the next token needs a block
    new = ask("new", prompt=32, arrival=0.1, first=0.1, step=0.1)
    scheduler = scheduler_with(running, [new], now=0.1, blocks=10)
    assert "new" in decided(scheduler, 0.1)[0]


def test_nobody_who_is_large_stays_behind_any_number_of_small_ones():
    small = [ask(f"small{at}", prompt=10, first=9.0, step=1.0) for at in range(40)]
    large = ask("large", prompt=300, first=0.4, step=1.0)
    assert "large" in decided(scheduler_with(waiting=[*small, large], ends=[100] * 50))[0]


def test_who_waits_for_memory_holds_none_meanwhile():
    """Of three times as many each has its turn a third of the time: what one takes of the memory is the same."""

    def taken(count):
        running = [ask(f"r{at}", prompt=30, most=400, first=9.0, step=9.0) for at in range(count)]
        scheduler = scheduler_with(running, [ask("new", prompt=30, first=9.0, step=9.0)], ends=[100] * 50)
        model = model_queues(seen(scheduler, 0.0), "llm")
        horizon = expectations(model, 400, margin=0.0, units=320.0, block=16)
        return Newcomers(
            Outlook(horizon, model.decodes), [], model.prefills, np.zeros(1), 0.0, 1.0, beside=True
        ).memory_time()[0]

    assert taken(60) == pytest.approx(taken(20), rel=0.05)


def test_first_outputs_come_in_order_of_deadline_where_all_are_in_time_so():
    waiting = [ask(f"short{at}", prompt=300, arrival=1.0, first=9.0) for at in range(40)]
    waiting.append(ask("long", prompt=1500, arrival=0.0, first=8.0))
    scheduler = scheduler_with(waiting=waiting, now=1.0)
    assert "long" in decided(scheduler, 1.0)[0]


def test_ten_thousand_that_wait_are_decided_about():
    waiting = [ask(f"r{at}", prompt=10 + at % 50, first=1.0 + at % 7, step=0.05) for at in range(10_000)]
    running, drop = decided(scheduler_with(waiting=waiting))
    assert 10 < len(running) <= 64 and not drop


@pytest.mark.parametrize("weight", [0.001, 1000])
def test_a_weight_alone_in_its_load_changes_nothing(weight):
    def chosen(weight):
        waiting = [ask(f"r{at}", first=1.0, step=0.03, weight=weight) for at in range(40)]
        return decided(scheduler_with(waiting=waiting, ends=[100] * 20))

    assert chosen(weight) == chosen(1)


def test_steps_that_miss_what_was_expected_leave_slack():
    def chosen(error):
        scheduler = scheduler_with(
            [ask("r", first=1.0, step=0.1)], [ask("new", prompt=190, arrival=0.9, first=5.0, step=1.0)], now=1.0 - 0.08
        )
        for _ in range(40):
            for ratio in (1 - error, 1.0, 1 + error):
                scheduler.times.note(("llm.decode", "llm.prefill"), ratio)
        view = seen(scheduler, 0.92)
        decision = Priced().decide(view)
        return sum(decision.sizes.values())

    assert chosen(0.0) >= chosen(0.3) > 0
    assert math.isclose(chosen(0.0), chosen(1e-12))


@pytest.mark.parametrize("seed", range(8))
def test_what_a_newcomer_adds_is_what_the_chances_of_all_rise_by(seed):
    """Several are weighed at once, and those who cannot be late are left out of the count, with the same sum."""
    draw = np.random.default_rng(seed)
    paces = draw.choice([0.03, 0.04, 0.5], 15, p=[0.1, 0.3, 0.6])
    running = [ask(f"r{at}", first=0.53, step=pace, most=300) for at, pace in enumerate(paces.tolist())]
    waiting = [ask(f"w{at}", arrival=0.5, first=1.0, step=draw.uniform(0.025, 0.06)) for at in range(20)]
    scheduler = scheduler_with(running, waiting, now=0.5, ends=[150] * 50)
    model = model_queues(seen(scheduler, 0.5), "llm")
    outlook = Outlook(expectations(model, 300, margin=0.0, units=math.inf, block=0), model.decodes)
    newcomers = Newcomers(outlook, [], model.prefills, np.full(20, 0.012), 0.0, 1.0, beside=True)
    later = outlook.horizon.points > 0
    rows = outlook.horizon.rows(model.prefills, running=True)

    def expected(who):
        own = [rows.count[who] * later, rows.context[who] * later, rows.kept[who], rows.kept[who]]
        spent = outlook.horizon.spent_by(outlook.needs + np.stack([part.sum(0) for part in own]), 0.012 * len(who))
        there = chances(rows.limits.later(), spent)
        return chances(outlook.rows.limits.later(), spent).sum() + there[who].sum(), there

    taken, refused = newcomers.nobody, 0
    for index in range(20):
        who = np.flatnonzero(taken.who).tolist()
        value, there = expected([*who, index])
        after = newcomers.adds(taken, index, 0.012, range(index + 1, 20), refused > 0)
        enough = value - expected(who)[0] >= WORTH * there[index]
        assert (after is not None) == (there[index] >= DOOMED and enough)
        taken, refused = after or taken, refused + (after is None)
    assert refused > 2 and taken.who.sum() > 2


def test_a_small_chance_that_costs_nobody_anything_is_taken():
    """Nobody was seen to end, and the maximum takes ten times what was promised."""
    short = {"prompt": 10, "most": 1000, "total": 1.0}
    scheduler = scheduler_with([ask("r", **short)], [ask("new", arrival=0.3, **short)], now=0.3)
    chosen, _ = decided(scheduler, 0.3)
    assert "new" in chosen


@pytest.mark.parametrize(("prompt", "back"), [(110, False), (10, True)])
def test_who_is_promised_nothing_more_takes_no_memory_that_others_wait_for(prompt, back):
    """One that lost its blocks after its first output, with room for it, beside one that needs more of it."""
    running = [ask("a", 32, first=1.0, step=0.1), ask("r", 48, first=1.0, step=0.1), ask("u", 32, first=1.0)]
    scheduler = scheduler_with(running, blocks=9)
    order = Hand(lambda view: Decision(sorted(view.jobs, key=lambda job: job.id)))
    batch = scheduler.next_batch("gpu", 0.0, instead=order)
    assert ids(batch.jobs) == ["a", "r"]  # u lost its blocks to them
    scheduler.finish(batch, [{"ended": job.id == "r"} for job in batch.jobs], 0.02)
    scheduler.submit(ask("new", prompt, arrival=0.02, first=1.0), 0.02)
    chosen, _ = decided(scheduler, 0.02)
    assert ("u" in chosen) == back and ("new" in chosen) == back


@pytest.mark.parametrize(("first", "back"), [(5.0, False), (0.5, True)])
def test_who_lost_its_memory_and_would_be_the_next_to_lose_it_leaves_room_to_those_who_run(first, back):
    """There is room for its prompt, and for one block more; two run that need one each before long."""
    running = [ask("a", 32, first=1.0, step=0.1), ask("b", 32, first=1.0, step=0.1), ask("r", 48, first=1.0, step=0.1)]
    scheduler = scheduler_with([*running, ask("u", 32, first=first, step=0.1)], blocks=10)
    order = Hand(lambda view: Decision(sorted(view.jobs, key=lambda job: job.id)))
    batch = scheduler.next_batch("gpu", 0.0, instead=order)
    assert ids(batch.jobs) == ["a", "b", "r"]  # u lost its blocks to them
    scheduler.finish(batch, [{"ended": job.id == "r"} for job in batch.jobs], 0.02)
    assert ("u" in decided(scheduler, 0.02)[0]) == back


def test_a_newcomer_with_a_promise_for_its_first_output_alone_slows_nobody_later():
    running = [ask(f"r{at}", first=0.53, step=0.0251, most=300) for at in range(15)]  # 15 decode in 0.025

    def chosen(**slo):
        new = ask("new", prompt=10, arrival=0.5, first=5.0, **slo)
        return "new" in decided(scheduler_with(running, [new], now=0.5, ends=[150] * 200), 0.5)[0]

    assert chosen()
    assert not chosen(step=0.0265)


@pytest.mark.parametrize(("weight", "enough"), [(0.3, True), (1.0, False)])
def test_who_adds_enough_beside_what_all_cost_together_does_whoever_of_the_others_comes(weight, enough):
    """Twelve decode in 22 ms, nine in 19 ms: the three who come make one late that has 20.5."""
    running = [ask(f"r{at}", first=0.53, step=0.05) for at in range(8)]
    running.append(ask("tight", first=0.53, step=0.0205, weight=weight))
    waiting = [ask(f"w{at}", arrival=0.5, first=1.0, step=0.05) for at in range(3)]
    scheduler = scheduler_with(running, waiting, now=0.5, ends=[*range(5, 60, 5)] * 9)
    model = model_queues(seen(scheduler, 0.5), "llm")
    outlook = Outlook(expectations(model, 300, margin=0.0, units=math.inf, block=0), model.decodes)
    newcomers = Newcomers(outlook, [], model.prefills, np.full(3, 0.012), 0.0, 1.0, beside=True)
    assert newcomers.all_add == enough
    for order in itertools.permutations(range(3)):
        taken = newcomers.nobody
        for index in order:
            taken = newcomers.adds(taken, index, 0.012, [], refused=False) or taken
        assert (taken.who.sum() == 3) == enough
        assert not enough or taken.value < newcomers.nobody.value + 3  # they cost the tight one something
