"""Profiles answer where they were measured, and say so where they were not."""

from __future__ import annotations

import math

import pytest

from neustream import LinearProfile, ProfileError, SumProfile, TableProfile, UnitProfile, load_profile
from neustream.core.observed import BLOCK, BOUND, LASTING, CorrectedProfile, Correction
from neustream.core.profile import largest_batch


def table(batch=(1, 2, 4), latency_s=(1.0, 2.0, 6.0), **more):
    return TableProfile("unet", batch, latency_s, **more)


def test_a_table_answers_what_was_measured_and_interpolates_between():
    profile = table(device="A100")
    assert [profile.latency(b) for b in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 6.0]
    assert (profile.name, profile.device, profile.max_batch) == ("unet", "A100", 4)


def test_a_table_of_one_row():
    profile = table([3], [0.5])
    assert profile.latency(3) == 0.5
    assert profile.monotone


def test_above_the_largest_batch_is_an_error_that_says_what_was_measured():
    with pytest.raises(ProfileError, match=r"profile 'unet' was not measured at batch 5 \(smallest: 1, largest: 4\)"):
        table().latency(5)


@pytest.mark.parametrize("batch", [0, -1, 1])
def test_below_the_smallest_batch_is_an_error(batch):
    with pytest.raises(ProfileError, match=rf"not measured at batch {batch} \(smallest: 2, largest: 4\)"):
        table([2, 4], [1.0, 2.0]).latency(batch)


def test_a_table_need_not_be_monotone():
    profile = table([1, 2, 3, 4], [1.0, 3.0, 2.0, 4.0])
    assert not profile.monotone
    assert profile.latency(2) == 3.0
    assert table().monotone
    assert table([1, 2], [1.0, 1.0]).monotone


def test_largest_batch_fits_the_budget():
    assert largest_batch(table(), 4.0) == 3
    assert largest_batch(table(), 3.999) == 2
    assert largest_batch(table(), 100.0) == 4
    assert largest_batch(table(), 0.5) == 0


def test_largest_batch_believes_a_table_that_is_faster_at_a_larger_batch():
    profile = table([1, 2, 3, 4], [1.0, 3.0, 2.0, 4.0])
    assert largest_batch(profile, 2.5) == 3
    assert largest_batch(profile, 1.5) == 1


def test_the_dit_xl_table_is_used_as_measured(root):
    profile = load_profile(root / "profiles/rtx4090/dit_xl2_256/dit.json")
    assert not profile.monotone
    assert profile.latency(14) < profile.latency(13)


@pytest.mark.parametrize(
    "batch, latency_s, problem",
    [
        ([], [], "equally long and not empty, got 0 and 0"),
        ([1, 2], [1.0], "equally long and not empty, got 2 and 1"),
        ([0, 1], [1.0, 1.0], r"batch must rise from 1 or more, got \[0, 1\]"),
        ([1, 1], [1.0, 1.0], "batch must rise"),
        ([2, 1], [1.0, 1.0], "batch must rise"),
        ([1, 2], [1.0, 0.0], "latencies must be finite and greater than 0, got 0.0"),
        ([1, 2], [-1.0, 1.0], "got -1.0"),
        ([1, 2], [1.0, math.nan], "got nan"),
        ([1, 2], [math.inf, 1.0], "got inf"),
    ],
)
def test_malformed_tables_are_refused(batch, latency_s, problem):
    with pytest.raises(ProfileError, match=f"profile 'unet': .*{problem}"):
        table(batch, latency_s)


def test_a_sum_adds_its_parts_up():
    parts = [table(device="A100"), LinearProfile("safety", base=0.5, per_size=0.25, max_batch=3, device="A100")]
    profile = SumProfile("vae", parts)
    assert profile.latency(2) == 2.0 + 0.5
    assert profile.latency(1, total=4.0) == 1.0 + 1.5
    assert profile.device == "A100"


def test_a_sum_reaches_as_far_as_its_smallest_part():
    profile = SumProfile("vae", [table(), table([1, 2], [1.0, 1.0])])
    assert profile.max_batch == 2
    with pytest.raises(ProfileError, match=r"profile 'vae' was not measured at batch 3 \(largest: 2\)"):
        profile.latency(3)
    with pytest.raises(ProfileError, match="batch 0"):
        profile.latency(0)


def test_a_sum_of_different_devices_is_refused():
    with pytest.raises(ProfileError, match=r"profile 'vae' adds up parts of different devices: \['A100', 'H100'\]"):
        SumProfile("vae", [table(device="H100"), table(device="A100")])


def test_a_linear_profile_adds_its_terms():
    profile = LinearProfile("prefill", base=1.0, per_job=0.5, per_size=0.25, per_square=0.125, max_batch=8)
    assert profile.latency(1) == 1.5
    assert profile.latency(2, total=4.0, square=16.0) == 1.0 + 1.0 + 1.0 + 2.0


@pytest.mark.parametrize("batch", [0, 9])
def test_a_linear_profile_ends_at_its_largest_batch(batch):
    profile = LinearProfile("decode", base=1.0, max_batch=8)
    with pytest.raises(ProfileError, match=rf"profile 'decode' is not valid at batch {batch} \(1 to 8\)"):
        profile.latency(batch)


@pytest.mark.parametrize("base", [-1.0, 0.0, math.nan])
def test_a_fit_that_gives_no_positive_time_is_an_error(base):
    profile = LinearProfile("prefill", base=base, per_size=0.5, max_batch=8)
    with pytest.raises(ProfileError, match=r"profile 'prefill' gives .* at batch 1, size 0.0: outside of its fit"):
        profile.latency(1)
    if not math.isnan(base):
        assert profile.latency(1, total=4.0) == base + 2.0


def test_a_linear_profile_needs_room_for_one_job():
    with pytest.raises(ProfileError, match="profile 'decode': max_batch must be 1 or more, got 0"):
        LinearProfile("decode", base=1.0, max_batch=0)


def test_units_are_read_off_a_table_at_the_sum_of_sizes():
    """Interpolated between its sizes, never less than its smallest, in several calls beyond its largest."""
    profile = UnitProfile(TableProfile("unet", [1, 2, 4], [1.0, 1.5, 2.5]))
    assert profile.max_batch == 4
    assert [profile.latency(b) for b in (1, 2, 3, 4)] == [1.0, 1.5, 2.0, 2.5]  # jobs without sizes count as 1
    assert profile.latency(1, 0.5) == 1.0
    assert profile.latency(2, 2.5) == 1.75
    assert profile.latency(2, 8.0) == 5.0
    assert profile.latency(3, 9.0) == 6.0
    assert profile.latency(3, 10.5) == 5.0 + 1.75


def test_corrected_profiles_interpolate_their_factors():
    base = TableProfile("unet", [1, 16], [1.0, 4.0])
    profile = CorrectedProfile(base, {1: 1.2, 3: 1.6})
    assert profile.factor(1) == 1.2 and profile.factor(100) == 1.6  # the nearest one's beyond them
    assert profile.factor(4) == pytest.approx(1.4)
    assert profile.latency(2) == pytest.approx(base.latency(2) * 1.2)
    assert CorrectedProfile(base, {}).latency(3) == base.latency(3)


def test_a_watch_corrects_what_was_measured_by_what_lasts():
    watch = Correction(TableProfile("unet", [1, 16], [1.0, 4.0]))
    steps = BLOCK * LASTING
    assert [watch.observe(1, 0.0, 0.0, 1.3) for _ in range(steps - 1)] == [None] * (steps - 1)
    corrected = watch.observe(1, 0.0, 0.0, 9.0)  # a stall does not move the median of the blocks
    assert corrected is not None and corrected.factors == pytest.approx({0: 1.3})
    assert watch.observe(1, 0.0, 0.0, 1.3) is None  # as it is known already
    for _ in range(3 * steps):
        watch.observe(1, 0.0, 0.0, 100.0)
    assert watch.factors == pytest.approx({0: BOUND})


def watched(steps):
    """The factors after steps of so many jobs that take so many times what is profiled."""
    base = TableProfile("unet", [1, 16], [1.0, 4.0])
    watch = Correction(base)
    for batch, ratio in steps:
        watch.observe(batch, 0.0, 0.0, ratio * base.latency(batch))
    return watch.factors


def test_a_size_is_off_by_what_its_steps_take_beside_those_around_them():
    long = 5 * BLOCK * LASTING
    assert watched([(4, 1.0), (8, 1.7)] * long) == pytest.approx({2: 1.0, 3: 1.7}, rel=0.05)
    assert watched([(4, 1.0), (4, 1.0), (4, 1.0), (8, 0.6)] * long) == pytest.approx({2: 1.0, 3: 0.6}, rel=0.05)
    assert watched([(4, 1.3), (8, 1.3)] * long) == pytest.approx({2: 1.3, 3: 1.3}, rel=0.05)


def test_steps_that_take_no_time_by_a_clock_that_stands_still_are_taken_in():
    """The sizes are alike then, and all take as little as is believed."""
    assert watched([(4, 0.0), (8, 0.0)] * BLOCK * LASTING) == pytest.approx({2: 1 / BOUND, 3: 1 / BOUND})


def test_large_batches_that_run_in_slow_phases_look_no_slower_than_small_ones():
    """More jobs wait while a device is slow, so that most large batches run then."""
    quick, slow = [(4, 1.0)] * 140 + [(8, 1.0)] * 30, [(4, 2.8)] * 5 + [(8, 2.8)] * 60
    factors = watched((quick + slow) * 9)
    assert factors.get(3, 1.0) == pytest.approx(factors.get(2, 1.0), rel=0.05)
