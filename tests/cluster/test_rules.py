"""Rules by hand: a fleet in, a choice out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from clusters import PROFILES, busy

from neustream import SLO, ConfigError
from neustream.cluster.fleet import Fleet, Instance, Place
from neustream.cluster.rules import MOVERS, ROUTERS, SCALERS
from neustream.core.demand import Calls
from neustream.core.outlook import Asked, Outlook, TextOutlook
from neustream.core.rates import Rates

CALLS = {"step": Calls(5, True, 4), "decode": Calls(1, False, 1)}
LLM = {"llm.prefill": Calls(1, False, 256, 64.0), "llm.decode": Calls(100, True, 256, 128.0)}


class Linear:
    """A latency of a prefill or decode: so much a token."""

    name = device = ""
    max_batch = 256

    def __init__(self, base: float, each: float) -> None:
        self.base, self.each = base, each

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        return self.base + self.each * total


TEXTS = {"llm.prefill": Linear(0.01, 1e-3), "llm.decode": Linear(0.02, 1e-5)}


def asked(total: float = 9.0, id: str = "r", calls=CALLS, **more) -> Asked:
    stage = next(iter(calls))
    slo = more.pop("slo", SLO(total=total))
    tokens = 64.0 if calls is LLM else 0.0
    return Asked(id, calls, stage, total, more.pop("first", total), tokens=tokens, slo=slo, **more)


def fleet_of(*outlooks: Outlook, profiles=PROFILES, told: bool = True) -> Fleet:
    fleet = Fleet({"": Rates(profiles)}, seed=3)
    for outlook in outlooks:
        instance = Instance(outlook.instance, 0, "whole", "", frozenset(profiles), outlook, 0.0, 0.0)
        fleet.add(instance)
        if told:
            fleet.told(instance, outlook)
    return fleet


def having(fleet: Fleet, **places: list[Place]) -> Fleet:
    fleet.requests = lambda name: places.get(name, [])
    return fleet


def place(id: str, instance: str, outputs: int = 1, arrival: float = 0.0, what: Asked | None = None) -> Place:
    return Place(id, instance, what or asked(id=id), arrival, True, outputs)


def text(name: str, free: int, decodes: int, waiting: int = 0, evicted: int = 0, prompts: int = 0) -> Outlook:
    one = TextOutlook("llm", decodes, 100.0 * decodes, prompts, 64.0 * prompts, evicted, 800, free, waiting, 16, 9.0)
    return Outlook(name, 0.0, 10**6, 0.0, 0.1, decodes + prompts, prompts, (), (one,))


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_chooses_one_that_can_serve_it(name):
    fleet = fleet_of(*(busy(str(n), n % 5, due_in=5.0) for n in range(9)))
    gone = fleet.instances["4"]
    gone.state = "draining"
    fleet.changed(gone)
    router = ROUTERS[name]()
    for number in range(30):
        chosen = router.route(fleet, asked(id=str(number))).instance
        assert chosen in fleet.instances and chosen != "4"
        fleet.sent(fleet.instances[chosen], asked(id=str(number)))


@pytest.mark.parametrize("rule", [*ROUTERS.values(), *MOVERS.values(), *SCALERS.values()])
def test_rules_are_frozen_and_say_what_they_do(rule):
    assert dataclasses.is_dataclass(rule) and rule.__dataclass_params__.frozen and rule.__doc__


def test_round_robin_takes_turns_whatever_the_load():
    fleet = fleet_of(busy("a", 4, 5.0), busy("b", 0, 5.0))
    router = ROUTERS["round_robin"]()
    chosen = []
    for _ in range(4):
        chosen.append(router.route(fleet, asked()).instance)
        fleet.sent(fleet.instances[chosen[-1]], asked())
    assert chosen == ["a", "b", "a", "b"]


def test_random_reaches_everybody():
    fleet = fleet_of(*(busy(str(n), 0, 5.0) for n in range(4)))
    chosen = Counter(ROUTERS["random"]().route(fleet, asked()).instance for _ in range(100))
    assert len(chosen) == 4 and min(chosen.values()) > 10


def test_requests_and_work_are_told_apart():
    many_short = replace(busy("a", 4, 5.0), backlog=0.5)
    few_long = replace(busy("b", 1, 5.0), backlog=3.0)
    fleet = fleet_of(many_short, few_long)
    assert ROUTERS["least_requests"]().route(fleet, asked()).instance == "b"
    assert ROUTERS["least_work"]().route(fleet, asked()).instance == "a"


def test_slack_asks_the_shortest_queue_at_learnt_speed_and_the_backlog_of_texts():
    slack = ROUTERS["slack"](k=1)
    many_short = replace(busy("a", 4, 9.0), backlog=0.5)
    few_long = replace(busy("b", 2, 9.0), backlog=3.0)
    assert slack.route(fleet_of(many_short, few_long), asked()).instance == "b"
    crawls = replace(few_long, speed={next(iter(CALLS)): 3.0})
    assert slack.route(fleet_of(many_short, crawls), asked()).instance == "a"
    texts = [replace(text("a", 100, 4), backlog=0.5), replace(text("b", 100, 2), backlog=3.0)]
    assert slack.route(fleet_of(*texts, profiles=TEXTS), asked(calls=LLM)).instance == "a"


def test_slack_has_a_request_that_fits_nowhere_go_to_where_it_ends_soonest():
    near = replace(busy("near", 3, 0.1, left=2), backlog=9.0)
    far = replace(busy("far", 3, 0.1, left=90), backlog=1.0)
    route = ROUTERS["slack"]().route(fleet_of(far, near), asked(0.1))
    assert (route.instance, route.reason, route.forecast.fits) == ("near", "ends soonest", False)


def test_slack_looks_at_few_of_many_in_the_order_of_their_backlog():
    fleet = fleet_of(*(busy(str(n), 1, 9.0, left=2 + n % 7) for n in range(600)))
    route = ROUTERS["slack"]().route(fleet, asked())
    assert route.forecast.fits and fleet.backlog(np.array([fleet.instances[route.instance].row]))[0] < 0.2


def test_headroom_is_least_or_most_of_what_keeps_the_promise():
    fleet = fleet_of(busy("idle", 0, 9.0), busy("half", 2, 9.0), busy("full", 4, 9.0, left=60))
    assert ROUTERS["headroom"](explore=0.0).route(fleet, asked(1.3)).instance == "half"
    assert ROUTERS["headroom"]("most", 0.0).route(fleet, asked(1.3)).instance == "idle"
    assert not ROUTERS["headroom"](explore=0.0).route(fleet, asked(0.2)).forecast.fits


def test_tiers_keep_classes_apart():
    fleet = fleet_of(busy("fast", 2, 9.0), busy("slow", 1, 9.0))
    classes = {"fast": asked(slo=SLO(total=9.0, name="fast")), "slow": asked(slo=SLO(total=9.0, name="slow"))}
    having(fleet, **{name: [place(name, name, what=what)] for name, what in classes.items()})
    for name, what in classes.items():
        assert ROUTERS["tiered"]().route(fleet, what).instance == name


def test_prefix_goes_where_the_prompt_is_unless_much_more_waits_there():
    fleet = fleet_of(busy("a", 1, 9.0), replace(busy("b", 1, 9.0), backlog=0.9))
    having(fleet, b=[place("x", "b", what=asked(params={"prompt": [1, 2, 3, 4]}))])
    one = asked(params={"prompt": [1, 2, 3, 9]})
    assert ROUTERS["prefix"]().route(fleet, one).instance == "b"
    assert ROUTERS["prefix"](spare_s=0.1).route(fleet, one).instance == "a"


@pytest.mark.parametrize(
    ("prompt", "other", "common"),
    [
        ([], [1], 0),
        ([1], [2], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2, 3], [1, 2], 2),
        ("a lighthouse at night", "a lighthouse by day", 13),
        ([7] * 999 + [1], [7] * 999 + [2, 7], 999),
        ([1, 2], (1, 2), 0),
        ([1, 2], None, 0),
    ],
)
def test_prefix_counts_what_prompts_have_in_common(prompt, other, common):
    fleet = fleet_of(busy("a", 1, 9.0), busy("b", 1, 9.0))
    having(fleet, b=[place("x", "b", what=asked(params={"prompt": other}))])
    routed = ROUTERS["prefix"]().route(fleet, asked(params={"prompt": prompt}))
    assert routed.reason == (f"{common} in common" if common else "least backlog")


def test_freeness_is_free_blocks_for_each_request():
    fleet = fleet_of(text("a", 400, 4, waiting=100), text("b", 200, 2), profiles=TEXTS)
    # (400 - 8 - 100) / 4 = 73 against (200 - 8) / 2 = 96
    assert ROUTERS["freeness"]().route(fleet, asked(calls=LLM)).instance == "b"
    fleet.sent(fleet.instances["b"], asked(calls=LLM))
    # (200 - 8 - 4) / 3 = 62.7 with the one that was sent
    assert ROUTERS["freeness"]().route(fleet, asked(calls=LLM)).instance == "a"
    assert ROUTERS["freeness"](own=False).route(fleet, asked(calls=LLM)).instance == "b"


def test_freeness_keeps_headroom_where_a_high_class_is():
    fleet = fleet_of(text("a", 400, 4), text("b", 300, 4), profiles=TEXTS)
    high = asked(calls=LLM, slo=SLO(name="high"))
    having(fleet, a=[place("h", "a", what=high)])
    router = ROUTERS["freeness"](headroom=300.0, high=("high",))
    assert router.route(fleet, asked(calls=LLM)).instance == "b"
    assert router.route(fleet, high).instance == "a"


def test_freeness_takes_turns_until_all_have_told():
    fleet = fleet_of(text("a", 400, 4), text("b", 300, 4), profiles=TEXTS, told=False)
    fleet.sent(fleet.instances["a"], asked(calls=LLM))
    assert ROUTERS["freeness"]().route(fleet, asked(calls=LLM)).instance == "b"


def test_llumnix_moves_the_latest_decoding_request_from_the_fullest_to_the_emptiest():
    fleet = fleet_of(
        text("full", 10, 8),
        text("evicted", 300, 2, evicted=1, prompts=1),
        text("x", 600, 2),
        text("y", 500, 2),
        profiles=TEXTS,
    )
    having(
        fleet,
        full=[place("old", "full"), place("new", "full", arrival=2.0), place("prompt", "full", 0, 3.0)],
        evicted=[place("e", "evicted")],
    )
    moves = MOVERS["freeness"]().moves(fleet)
    assert [(move.id, move.source, move.target) for move in moves] == [("e", "evicted", "x"), ("new", "full", "y")]


def test_rescue_moves_what_would_be_late_to_where_it_fits():
    fleet = fleet_of(busy("a", 4, due_in=1.0), busy("b", 0, 9.0), busy("c", 4, 9.0, left=3))
    having(fleet, a=[place("r", "a", what=asked(2.0, id="r"))], c=[place("s", "c")])
    (move,) = MOVERS["rescue"]().moves(fleet)
    assert (move.id, move.source, move.target, move.reason) == ("r", "a", "b", "would be late")


def test_rescue_leaves_alone_what_is_on_time_or_fits_nowhere():
    on_time = having(fleet_of(busy("a", 4, due_in=9.0), busy("b", 0, 9.0)), a=[place("r", "a")])
    assert not MOVERS["rescue"]().moves(on_time)
    both = having(fleet_of(busy("a", 4, due_in=1.0), busy("b", 4, 1.2)), a=[place("r", "a", what=asked(1.2, id="r"))])
    assert not MOVERS["rescue"]().moves(both)


def test_rescue_empties_a_suspect_instance():
    fleet = having(fleet_of(busy("a", 1, 9.0), busy("b", 0, 9.0)), a=[place("r", "a")])
    fleet.instances["a"].state = "suspect"
    fleet.changed(fleet.instances["a"])
    (move,) = MOVERS["rescue"]().moves(fleet)
    assert move.reason == "suspect" and move.target == "b"


def test_consolidate_empties_the_least_loaded():
    fleet = fleet_of(busy("a", 1, 9.0, left=2), busy("b", 2, 9.0, left=4), busy("c", 0, 9.0))
    having(fleet, a=[place("r", "a")], b=[place("s", "b")])
    (move,) = MOVERS["consolidate"]().moves(fleet)
    assert (move.id, move.target) == ("r", "b")


def test_the_freeness_scaler_keeps_the_mean_in_a_band():
    scaler = SCALERS["freeness"](max=4)
    assert scaler.target(fleet_of(text("a", 50, 10), profiles=TEXTS)) == {"whole": 2}  # 4.2 free each: too little
    assert scaler.target(fleet_of(text("a", 400, 10), profiles=TEXTS)) == {"whole": 1}
    idle = fleet_of(text("a", 790, 2), text("b", 790, 2), profiles=TEXTS)
    assert scaler.target(idle) == {"whole": 1}  # 187 free each without the last


def test_the_charge_scaler_counts_what_came_and_what_waits():
    fleet = fleet_of(busy("a", 0, 9.0))
    fleet.now = 20.0
    one = asked()  # 5 steps of 0.05 and 0.1: 0.35 s
    fleet.arrivals.extend((20.0 - 0.1 * n, one) for n in range(100))
    assert SCALERS["charge"]().target(fleet) == {"whole": 3}  # 1.75 a second over 0.85
    fleet.queued = lambda: [one] * 200
    assert SCALERS["charge"](max=6).target(fleet) == {"whole": 6}  # 7 seconds a second


def test_the_charge_scaler_lets_go_of_one_at_a_time():
    fleet = fleet_of(*(busy(name, 0, 9.0) for name in "abc"))
    fleet.now = 30.0
    assert SCALERS["charge"]().target(fleet) == {"whole": 2}
    assert SCALERS["charge"](min=3).target(fleet) == {"whole": 3}
    assert SCALERS["fixed"](5).target(fleet) == {"whole": 5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ROUTERS["slack"](0), "slack: k must be 1 or more, got 0"),
        (lambda: ROUTERS["headroom"](explore=2.0), "explore must be from 0 to below 1"),
        (lambda: ROUTERS["prefix"](spare_s=-1.0), "spare_s must be 0 or more"),
        (lambda: ROUTERS["tiered"](0), "most must be 1 or more"),
        (lambda: MOVERS["rescue"](k=0), "k must be 1 or more"),
        (lambda: MOVERS["consolidate"](k=0), "k must be 1 or more"),
        (lambda: SCALERS["charge"](min=3, max=2), r"min must be from 1 to max \(2\), got 3"),
        (lambda: SCALERS["charge"](fill=2.0), "fill must be over 0.15"),
        (lambda: SCALERS["freeness"](min=0), "min must be from 1 to max"),
        (lambda: SCALERS["fixed"](0), "count must be 1 or more, got 0"),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
