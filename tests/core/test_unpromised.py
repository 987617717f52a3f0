"""Requests without a promise beside promised ones, under the default policy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from toys import engine, table

from neustream import FCFS, SLO, ConfigError, Graph, Priced, Request, Stage, loop, seq
from neustream.core.events import Ended
from neustream.core.policies.background import beside
from neustream.core.policy import Decision, Unpromised
from neustream.engine.events import Finished
from neustream.graphs import llm, llm_profiles

UNET = Stage("unet", max_batch=4)
IMAGE = Graph("image", seq(loop(UNET, times=lambda job: job.params["steps"]), Stage("vae", emits=True)))
PROFILES = {"unet": table("unet", 0.10, 0.16, 0.22, 0.28), "vae": table("vae", 0.02)}


def images(count, gap, slo, prefix="p", start=0.0, steps=5):
    return [Request(f"{prefix}{index}", IMAGE, start + index * gap, slo, {"steps": steps}) for index in range(count)]


def ends(graph, profiles, policy, requests, observers=()):
    """When each request ended, and how."""
    ended = {}

    def note(record):
        if isinstance(record, Ended):
            ended[record.id] = record

    served = engine(graph, profiles, policy, observers=[note, *observers])
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


def steps_of(profiles, policy, requests):
    """The ids of each step, and tokens by id."""
    steps = []

    def note(record):
        if isinstance(record, Finished):
            steps.append(dict(zip(record.step.ids, record.step.sizes, strict=True)))

    ended = ends(CHAT, profiles, policy, requests, [note])
    return steps, ended


def test_a_prompt_with_a_claim_is_prefilled_along_in_parts_and_no_promise_is_lost():
    profiles = llm_profiles("llm", Steps(), max_batch=4)
    pace = SLO(first=0.03, step=0.0211)  # no time for a step of 20 ms between two outputs
    promised = texts(1, 0.0, pace, tokens=200)
    prompt = Request("u0", CHAT, 0.1, SLO(), {"prompt_tokens": 60, "max_tokens": 3})
    steps, ended = steps_of(profiles, Priced(background=0.05), [*promised, prompt])
    parts = [step["u0"] for step in steps if len(step) == 2 and step["u0"] < 60]
    assert len(parts) >= 3
    assert all("p0" in step for step in steps if "u0" in step)
    assert ended["u0"].at < ended["p0"].at
    assert on_time(ended) == 1


class Apart(Steps):
    """A step takes as long as each of its prompts, and all of its decodes, apart."""

    def seconds(self, step):
        return 0.02 * (step.prefills + min(step.decodes, 1)) + step.tokens / 10_000


def asked_beside(profiles, pace, prompt, ask):
    """What `ask` tells of the first view of a promised decode and a prompt without a promise."""
    told = []

    class Asking:
        def decide(self, view):
            if not told and len({job.promised for job in view.jobs}) == 2:
                told.append(ask(view))
            return Priced().decide(view)

    ends(CHAT, profiles, Asking(), [*texts(1, 0.0, pace, tokens=60), prompt])
    return told[0]


def test_where_no_prompt_can_ride_it_runs_alone_once_the_device_owes_it_that():
    def owed(seconds):
        def ids(view):
            short = replace(view, unpromised=Unpromised(1.0, 0.05 - seconds))
            return [job.id for job in Priced(background=0.05).decide(short).jobs]

        prompt = texts(1, 0.0, SLO(), prefix="u", start=0.1)[0]
        return asked_beside(profiles, SLO(first=0.03, step=0.0211), prompt, ids)

    profiles = llm_profiles("llm", Apart(), max_batch=4)
    assert owed(0.0205) == ["p0"]  # a step of its ten tokens takes 21 ms
    assert owed(0.0215) == ["u0"]


class Steep(Steps):
    """A step of 64 tokens takes a second, one of ten hardly longer than a decode."""

    def seconds(self, step):
        return 0.02 + 1e-5 * max(step.tokens - 10, 0) ** 3 / 1.6


def test_a_short_prompt_waits_for_no_more_than_its_own_step():
    profiles = llm_profiles("llm", Steep(), max_batch=2)
    promised = texts(240, 1 / 12, SLO(first=1.0, step=0.021))  # no time for another step between two outputs
    beside = texts(1, 0.0, SLO(), prefix="u", start=2.0, tokens=5)
    served = ends(CHAT, profiles, Priced(background=0.05), [*promised, *beside])
    assert served["u0"].at < 2.0 + 5 * 0.021 / 0.05 + 1.0


def test_without_a_share_no_prompt_rides():
    profiles = llm_profiles("llm", Steps(), max_batch=4)
    promised = texts(1, 0.0, SLO(first=1.0, step=0.03), tokens=50)
    prompt = texts(1, 0.0, SLO(), prefix="u", start=0.5, tokens=3)
    steps, ended = steps_of(profiles, Priced(background=0.0), [*promised, *prompt])
    assert not [step for step in steps if len(step) == 2]
    assert ended["u0"].at > ended["p0"].at


def test_while_promised_decodes_pause_others_run_only_until_they_go_on():
    def pause(seconds):
        def own(view):
            until = view.now + seconds
            return beside(view, 0.05, lambda _: Decision(wake_at=until)), until

        prompt = Request("u0", CHAT, 0.5, SLO(), {"prompt_tokens": 60, "max_tokens": 3})
        decision, until = asked_beside(profiles, SLO(first=1.0, step=0.05), prompt, own)
        return [*decision.sizes.values()], decision.wake_at == until

    profiles = llm_profiles("llm", Steps(), max_batch=4)
    assert pause(0.027) == ([60.0], False)
    assert pause(0.021) == ([10.0], False)  # 1 ms beyond the 20 ms of any step
    assert pause(0.019) == ([], True)


def test_what_they_had_for_free_is_no_debt():
    """They ran for eight seconds while hardly anybody was promised anything; then promised ones fill all seats."""
    profiles = llm_profiles("llm", Steps(), max_batch=4)
    early = texts(8, 1.0, SLO(first=1.0, step=0.1))
    promised = texts(160, 1 / 12, SLO(first=1.0, step=0.1), prefix="q", start=8.0)  # four seats serve ten a second
    long = texts(1, 0.0, SLO(), prefix="u", tokens=450)
    beside = texts(1, 0.0, SLO(), prefix="v", start=8.5, tokens=5)
    served = ends(CHAT, profiles, Priced(background=0.05), [*early, *promised, *long, *beside])
    assert served["u0"].status == "done"
    # both decode together, at a twentieth of the device
    assert served["v0"].at < 8.5 + 5 * 0.021 / 0.05 + 1.5
