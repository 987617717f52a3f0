"""Our rule: promise only what fits, charge for device time what the load says it is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from neustream.core.policies.per_model import PerModel, check_background
from neustream.core.policies.priced_steps import PricedSteps
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policies.whole_way import WholeWay
from neustream.core.policy import Decision, View
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Priced:
    """Admission by commitment, at a price for device time that follows the load; the default.

    A job's *charge* is the device time that the rest of it costs at least: a step in a batch of b
    takes latency(b) but occupies only 1/b of the device, and how large its batches may be depends
    on the time it has per step. So a charge grows as slack is lost. Then, before each step:

    1. **Promises are kept.** Jobs that have run are promised to be on time as long as all of them
       can be (`feasibility.py`: in turns, or on seats, where these are worth what their small
       batches cost). If they cannot, those stay promised of whom the most weight is expected on
       time, as runs of steps took lately (`chances.py`); the others wait for room. Where steps vary
       they ride along while no less is expected on time: a plan that just fails often holds.
    2. **What fits is promised.** Waiting jobs are admitted, those with the most time per step
       first, if all promised jobs and they are still on time. Those with several times what the
       most efficient batch takes are behind all others: they lose nothing by waiting.
       By as much of the time as recent requests fill, others come in place of those who end: a
       newcomer needs a seat that does not come of their going (`lasting.py`).
    3. **The price** (a shadow price). From the charges that the last hundred requests had when
       they came follows the weight per second that the device earned if it served the best of
       them: 0 while all fit. A job that brings less than `price` times that per second of charge
       is not admitted: under overload a job that has waited too long needs small batches, and
       keeps fresh ones out.
       Nor does one begin whose steps make more weight late, of those that have no time for a step
       of others, than it brings: rather the device idles. The longer none came, the fewer count.
    4. **Exchange.** Where a job does not fit, it takes the place of a promised one (its work so far
       is lost) of no more weight, if that one's charge, by weight, is larger by more than `gain`;
       or that of several that together have less weight, by as much. One that has not begun and
       would not run next takes nothing yet: it makes room only for more weight.
       Who keeps the batch so small that this costs more than its weight makes room for several that
       cannot wait for its end, if they weigh more by more than the heaviest promised one. So do
       several of one model for many of another, of which one alone takes nearly as long as many.
    5. **The step.** In turns, the most efficient batch of at most the line's length; on seats, as
       many as the tightest can afford; least laxity first. Encodings of admitted jobs come first;
       one that could be larger waits while steps run, if it has time and saves much by it.
       Of several models' steps the one with the first deadline runs (`several.py`).
       While others wait for room, decodes wait for each other as long as they stay in time even if
       steps are slow ones.

    A job that is not promised waits until it is promised or hopeless. If none is promised, the
    price is waived; if none fits even so, the job of the most weight per charge runs: no device
    idles while there is hope. Latencies are the profile's times `View.speed`.

    Jobs without a promise get at least the share `background` of the device's time while some of
    them wait (`background.py`; 0: no such share). Promised jobs are decided as if they were absent.

    The steps of a language model follow a rule of their own with the same aims
    (`token_deadlines.py`, whose parameters are `tokens`). Where both kinds are in one pool, each
    rule promises only what the other one's promises leave of the device (`per_model.py`). Where the
    device is not enough for all kinds, and much is lost, it is for those language models alone, and
    those images beside them, that bring most weight by the second (`device_for.py`). Of
    requests that go through several pools, with nothing promised but their end, the whole way
    counts (`whole_way.py`).

    In a pool of several workers each plans for the jobs that it ran itself; those that have not run
    are taken by the first worker with room.

    Raises:
        ConfigError: a parameter is out of bounds.
    """

    price: float = 0.9
    gain: float = 0.1
    tokens: TokenDeadlines = field(default_factory=TokenDeadlines)
    background: float = 0.05

    def __post_init__(self) -> None:
        for name in ("price", "gain"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"priced: {name} must be 0 or more and finite, got {value}")
        check_background("priced", self.background)

    @cached_property
    def _rules(self) -> PerModel:
        tokens = WholeWay(self.tokens)
        steps = PricedSteps(self.price, self.gain)
        return PerModel(tokens, steps, self.background, chooses=True)

    def decide(self, view: View) -> Decision:
        return self._rules.decide(view)
