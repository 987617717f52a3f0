"""Requests without a promise beside promised ones, under the default policy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from toys import engine, table

from neustream import FCFS, SLO, ConfigError, Graph, Priced, Request, Stage, loop, seq
from neustream.core.events import Ended
from neustream.core.policy import Unpromised
from neustream.graphs import llm, llm_profiles

UNET = Stage("unet", max_batch=4)
IMAGE = Graph("image", seq(loop(UNET, times=lambda job: job.params["steps"]), Stage("vae", emits=True)))
PROFILES = {"unet": table("unet", 0.10, 0.16, 0.22, 0.28), "vae": table("vae", 0.02)}


def images(count, gap, slo, prefix="p", start=0.0, steps=5):
    return [Request(f"{prefix}{index}", IMAGE, start + index * gap, slo, {"steps": steps}) for index in range(count)]


def ends(graph, profiles, policy, requests):
    """When each request ended, and how."""
    ended = {}

    def note(record):
        if isinstance(record, Ended):
            ended[record.id] = record

    served = engine(graph, profiles, policy, observers=[note])
    served.run(sorted(requests, key=lambda request: request.arrival))
    return ended


def on_time(ended):
    return sum(end.status == "done" and end.on_time for id, end in ended.items() if id[0] == "p")


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan, math.inf])
def test_a_share_is_from_0_to_below_1(share):
    with pytest.raises(ConfigError, match="background must be 0 or more and below 1"):
        Priced(background=share)


def test_without_promised_requests_they_run_as_under_fcfs():
    requests = images(12, 0.1, SLO(), prefix="u")
    ours = ends(IMAGE, PROFILES, Priced(), requests)
    theirs = ends(IMAGE, PROFILES, FCFS(drop_hopeless=False), requests)
    assert {id: end.at for id, end in ours.items()} == {id: end.at for id, end in theirs.items()}


def test_beside_a_load_above_capacity_they_get_their_share():
    slo = SLO(total=2.0)
    promised = images(150, 0.28, slo)  # 5 steps of 70 ms at best: 1.25 times capacity
    beside = images(3, 0.0, SLO(), prefix="u", start=5.0)
    never = ends(IMAGE, PROFILES, Priced(background=0.0), [*promised, *beside])
    alone = ends(IMAGE, PROFILES, Priced(), promised)
    served = ends(IMAGE, PROFILES, Priced(background=0.1), [*promised, *beside])
    last = 150 * 0.28
    assert min(never[f"u{index}"].at for index in range(3)) > last
    # three requests together: 5 steps of 0.22 s and a decode each, at a tenth of the device
    assert max(served[f"u{index}"].at for index in range(3)) < 5.0 + (5 * 0.22 + 3 * 0.02) / 0.1 + 2.0
    assert on_time(served) >= 0.9 * on_time(alone)
    assert on_time(never) == on_time(alone)


def test_below_capacity_promised_requests_lose_nothing_by_them():
    promised = images(60, 0.5, SLO(total=2.0))
    beside = images(5, 0.0, SLO(), prefix="u", start=5.0)
    alone = ends(IMAGE, PROFILES, Priced(), promised)
    served = ends(IMAGE, PROFILES, Priced(), [*promised, *beside])
    assert on_time(served) == on_time(alone) == 60
    assert all(served[f"u{index}"].status == "done" for index in range(5))


# -- one decision -----------------------------------------------------------------------------------


class Asked:
    """Runs as another policy would, and keeps the first view with both kinds of jobs."""

    def __init__(self, policy):
        self.policy = policy
        self.view = None

    def decide(self, view):
        kinds = {job.promised for job in view.jobs}
        if self.view is None and len(kinds) == 2:
            self.view = view
            self.chosen = {share: self.ids(view, share) for share in (0.0, 0.5, 1.5)}
        return self.policy.decide(view)

    def ids(self, view, part):
        """Who runs if they got `part` of their share."""
        got = replace(view, unpromised=Unpromised(100.0, 100.0 * 0.1 * part))
        return sorted(job.id for job in Priced(background=0.1).decide(got).jobs)


def first_decision(*requests):
    asked = Asked(FCFS(drop_hopeless=False))
    engine(IMAGE, PROFILES, asked).run(sorted(requests, key=lambda request: request.arrival))
    return asked.chosen


def test_a_claim_rides_along_and_others_wait_if_they_would_cost_a_promise():
    tight = Request("p0", IMAGE, 0.0, SLO(total=0.6), {"steps": 5})
    chosen = first_decision(tight, *images(2, 0.0, SLO(), prefix="u"))
    assert chosen == {0.0: ["p0", "u0", "u1"], 0.5: ["p0", "u0", "u1"], 1.5: ["p0"]}


def test_without_a_claim_they_ride_where_promised_jobs_have_half_of_their_time_to_spare():
    loose = Request("p0", IMAGE, 0.0, SLO(total=9.0), {"steps": 5})
    chosen = first_decision(loose, *images(2, 0.0, SLO(), prefix="u"))
    assert chosen[1.5] == ["p0", "u0", "u1"]


def test_a_claim_has_a_step_of_its_own_where_the_batch_is_full():
    full = images(4, 0.0, SLO(total=2.5))
    chosen = first_decision(*full, *images(2, 0.0, SLO(), prefix="u"))
    assert chosen[0.5] == ["u0", "u1"]
    assert chosen[1.5] == ["p0", "p1", "p2", "p3"]


# -- generations ------------------------------------------------------------------------------------

CHAT = Graph("chat", llm("llm", max_batch=4))


class Steps:
    """20 ms for any step, and 1 ms more for each ten tokens of prompts."""

    name, device = "llm", "toy"
    learns, error = False, 0.0

    def seconds(self, step):
        return 0.02 + step.tokens / 10_000

    def profiled(self, step):
        return self.seconds(step)


def texts(count, gap, slo, prefix="p", start=0.0, tokens=20):
    params = {"prompt_tokens": 10, "max_tokens": tokens}
    return [Request(f"{prefix}{index}", CHAT, start + index * gap, slo, params) for index in range(count)]


def test_a_text_without_a_promise_is_served_though_promised_ones_fill_all_seats():
    profiles = llm_profiles("llm", Steps(), max_batch=4)
    promised = texts(120, 1 / 12, SLO(first=1.0, step=0.1))  # four seats serve ten a second
    beside = texts(1, 0.0, SLO(), prefix="u", start=2.0, tokens=5)
    alone = ends(CHAT, profiles, Priced(), promised)
    never = ends(CHAT, profiles, Priced(background=0.0), [*promised, *beside])
    served = ends(CHAT, profiles, Priced(background=0.05), [*promised, *beside])
    assert never["u0"].at > 8.0
    assert served["u0"].at < 2.0 + 5 * 0.021 / 0.05 + 1.0
    assert on_time(served) >= 0.9 * on_time(alone)


def test_texts_without_a_promise_alone_run_as_under_fcfs():
    profiles = llm_profiles("llm", Steps(), max_batch=4)
    requests = texts(10, 0.05, SLO(), prefix="u")
    ours = ends(CHAT, profiles, Priced(), requests)
    theirs = ends(CHAT, profiles, FCFS(drop_hopeless=False), requests)
    assert {id: end.at for id, end in ours.items()} == {id: end.at for id, end in theirs.items()}
