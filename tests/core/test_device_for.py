"""Which language models a device is for, where it is not enough for all that come."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from hand import seen
from images_and_texts import images, one_of_each, serve, texts

from neustream import PerModel, Priced
from neustream.core.demand import Missed
from neustream.core.policies import PricedSteps, TokenDeadlines
from neustream.core.policies.device_for import not_for

CROWD = images(400, 0.15, 10, 0.9), texts(60, 1.0, 100, 2.0, 0.08, models=("chat", "code"))
"""A decode of 0.05 s is due each 0.08 s as long as one text of a model lives, which is eight seconds: both models
together need more than the device, and an image beside one of them has no time for its ten steps."""


def test_of_kinds_that_keep_each_other_out_the_device_is_for_those_that_bring_most():
    assert serve(Priced(), CROWD[0]) == {"images kept": 400}
    assert serve(Priced(), CROWD[1][::2]) == {"texts kept": 30} == serve(Priced(), CROWD[1][1::2])
    served = serve(Priced(), *CROWD)
    everybody = serve(PerModel(TokenDeadlines(), PricedSteps()), *CROWD)
    assert served["images kept"] > 350 and everybody["images kept"] + everybody["texts kept"] < 170
    assert served["texts lost"] < 25, "those that had begun before it was known what comes"


def test_texts_are_served_again_when_fewer_images_come():
    calm = texts(40, 1.0, 20, 2.0, 0.08, start=70.0), images(40, 1.0, 2, 0.9, start=70.5)
    alone = serve(Priced(), *CROWD)
    served = serve(Priced(), *CROWD, *calm)
    assert served == {**alone, "images kept": alone["images kept"] + 40, "texts kept": alone.get("texts kept", 0) + 40}


def test_the_device_is_for_all_as_long_as_little_is_lost():
    """Both need nearly all of it, and more than all by what is known of a burst."""
    loads = images(40, 0.5, 10, 3.0), texts(60, 0.25, 20, 1.0, 0.2)
    assert serve(Priced(), *loads) == {"images kept": 40, "texts kept": 60}


def test_texts_of_one_output_need_no_decode():
    """Many come with promises that nobody could keep: what they need is looked at after their losses."""
    hopeless = texts(30, 0.2, 1, 0.001, math.inf, models=("chat", "code"))
    assert serve(Priced(), images(20, 0.5, 2, 3.0, start=1.0), hopeless)["images kept"] == 20
    kept = serve(Priced(), CROWD[0], texts(60, 1.0, 1, 2.0, 0.08, models=("chat", "code")))
    assert kept["texts kept"] > 50 and kept["images kept"] > 350


def test_there_is_no_choice_where_a_part_of_a_model_is_served_elsewhere():
    view = seen(one_of_each(), 0.1, pool="gpu")
    later = [replace(demand, at=0.5) for demand in view.recent]
    lost = replace(view, now=1.0, recent=(*view.recent, *later * 20), missed=[Missed(0.9, 1.0)] * 38, memo={})
    assert not_for(lost, {}) == {"chat"}
    stages = tuple(name for name in view.pool.stages if name != "chat.decode")
    profiles = {name: view.profiles[name] for name in stages}
    apart = replace(lost, pool=replace(view.pool, stages=stages), profiles=profiles, memo={})
    assert not not_for(apart, {})


def test_who_waits_for_a_model_that_the_device_is_not_for_is_told_so():
    reasons = Counter()
    serve(Priced(), *CROWD, told=lambda record: reasons.update([record.reason]))
    told = [reason for reason in reasons if "others bring more in time" in reason]
    assert sum([reasons[reason] for reason in told]) > 40
    assert {reason.partition(":")[0] for reason in told} == {"hopeless", "shed"}
