"""What is computed for many generations at once is what it is for each."""

from __future__ import annotations

import numpy as np
import pytest
from toys import Flat

from neustream import LinearProfile, TableProfile
from neustream.core.learnt_steps import LearntSteps
from neustream.core.lengths import BIN, Lengths
from neustream.core.many_decodes import decode_seconds
from neustream.core.steps import DecodeGrid, PrefillTable, Step, StepProfile

PREFILL = PrefillTable("prefill", [1, 100], [0.01, 0.02], (0.01, 1e-4, 0.0))
LINEAR = StepProfile("llm", PREFILL, LinearProfile("decode", base=0.01, per_job=3e-4, per_size=1e-6, max_batch=400))
TABLE = [[0.02, 0.021, 0.025], [0.022, 0.021, 0.03], [0.03, 0.04, 0.1]]
GRID = StepProfile("llm", PREFILL, DecodeGrid("decode", [1, 8, 64], [16, 100, 900], TABLE, (0.01, 1e-4, 1e-6)))


def learnt(base):
    steps = LearntSteps(base, name="llm")
    for at in range(40):
        steps.observe(Step(decodes=at % 7 + 1, context=100.0 * at), 0.02 + 1e-3 * at)
        steps.observe(Step(2, 50.0 + at, 1000.0, at % 5, 10.0 * at), 0.05)
    return steps


KINDS = {
    "a fit": LINEAR,
    "a grid": GRID,
    "learnt from nothing": learnt(None),
    "learnt from a fit": learnt(LINEAR),
    "nothing learnt so far": LearntSteps(GRID),
    "nothing known": LearntSteps(name="llm"),
    "of somebody's own": Flat(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_many_decodes_take_to_the_bit_what_each_of_them_takes(kind):
    draw = np.random.RandomState(0)
    batch = draw.randint(1, 300, (20, 9)).astype(float)
    batch[0] = [1, 8, 64, 65, 1, 8, 64, 2, 300]  # on the points of the grid, and beyond
    context = batch * draw.choice([1.0, 16.0, 100.0, 333.3, 900.0, 2000.0], batch.shape)
    each = [
        KINDS[kind].seconds(Step(decodes=int(size), context=total))
        for size, total in zip(batch.ravel(), context.ravel(), strict=True)
    ]
    assert decode_seconds(KINDS[kind], batch, context).ravel().tolist() == each


def test_beyond_its_largest_batch_a_profile_goes_on():
    """A rule asks what it would be if all who wait had come: more than run in one step."""
    batch, context = np.array([3.0, 401.0]), np.array([30.0, 30.0])
    assert decode_seconds(LINEAR, batch, context).tolist() == pytest.approx([0.01 + 9.3e-4, 0.01 + 401 * 3e-4 + 3e-5])
    table = StepProfile("llm", PREFILL, TableProfile("decode", [1, 4], [0.01, 0.02]))
    assert decode_seconds(table, np.array([4.0, 9.0]), context).tolist() == [0.02, 0.02]


def test_usual_lengths_of_many_are_those_of_each():
    lengths = Lengths()
    for end in [5, 17, 30, 44, 44, 90, 200, 201, 350] * 6:
        for outputs in range(1, end + 1):
            lengths.reached(outputs)
        lengths.ended(end, 500)
    outputs = np.arange(0, 500, 3)
    curve = lengths.survival()

    def within(count, share):
        """The definition, by looking at each place of the curve."""
        now = curve[min(count // BIN, len(curve) - 1)]
        below = [at for at, there in enumerate(curve) if there < now * (1 - share)]
        return max(below[0] * BIN - count, 0.0) if below and now > 0 else np.inf

    for share in (0.02, 0.5, 0.9):
        expected = [within(count, share) for count in outputs.tolist()]
        assert lengths.each_within(outputs, share).tolist() == expected
        assert [lengths.within(count, [share])[0] for count in outputs.tolist()] == expected
