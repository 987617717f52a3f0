"""Texts on a cluster that are routed by what their prompts have in common."""

from __future__ import annotations

import pytest
import torch
from test_cluster_driver import running, until
from texts import made, prompts

from neustream import serve
from neustream.backends.transformers import TextMount
from neustream.cluster.happenings import Routed
from neustream.cluster.rules.prefix import Prefix
from neustream.core.learnt_steps import LearntSteps


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def chat(number):
    return serve({"chat": TextMount(made("llama"), profile=LearntSteps(), slots=4)})


def routed(driver):
    """Where requests went, and why."""
    return {event.id: event for event in list(driver.events) if isinstance(event, Routed)}


def test_a_text_goes_where_one_is_that_begins_as_it_does():
    """Instances that hang keep what they have: each request is open while the next one is routed."""
    with running(chat, router=Prefix(spare_s=60.0)) as driver:
        for name in driver.places:
            driver.machines.hang(name)
        head, tail, other = prompts(3, seed=5, low=8, high=8)
        asked = {"first": head, "alike": [*head, *tail], "apart": other, "again": [*other, *tail]}
        for id, prompt in asked.items():
            driver.submit((prompt,), {"max_tokens": 2}, "chat", None, id)
            until(lambda id=id: id in routed(driver))
        reasons = {id: event.reason for id, event in routed(driver).items()}
        assert reasons["first"] == reasons["apart"] == "least backlog"
        assert reasons["alike"] == reasons["again"] == "8 in common"
        places = {id: event.instance for id, event in routed(driver).items()}
        assert places["first"] == places["alike"] and places["apart"] == places["again"]
