"""Many threads ask a language model at once, some of them wrongly: good requests get what stock gives alone."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_texts import engine
from texts import alone, made

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LLAMA = {"intermediate_size": 128, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("served_texts")


@pytest.mark.parametrize(("slots", "policy"), [(8, "priced"), (2, "edf")])
def test_a_storm_with_wrong_arguments_and_raising_callbacks(bench, slots, policy):
    model = made("llama", **LLAMA, max_position_embeddings=128)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with engine(model, slots=slots, policy=policy) as running:
        tried = bench.Storm(running, seed=slots)
        with ThreadPoolExecutor(12) as threads:
            outcomes = Counter(threads.map(tried.ask, range(250)))
        assert running([5, 6, 7], max_tokens=3).token_ids == tuple(alone(model, [5, 6, 7], 3))
        assert running.models[""].used == 0 and running.snapshot().open == 0
    assert set(outcomes) == {"done", "refused", "failed", "cancelled"} and outcomes["done"] > 150
    assert len(tried.answered) == 250 - outcomes["refused"] and set(tried.answered.values()) == {1}
    for prompt, drawn, got in tried.good:
        assert got == bench.stock_tokens(model, prompt, drawn, len(got))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_storm_of_good_requests_with_one_that_changes_the_model():
    """Who got all tokens got the right ones, also if the model is changed in the middle."""
    model = made("llama", **LLAMA)
    draw = random.Random(3)
    asked = [[draw.randrange(3, 96) for _ in range(draw.randint(1, 30))] for _ in range(60)]
    wanted = [alone(model, prompt, 10, eos_token_id=-1) for prompt in asked]
    with engine(model, slots=4) as running:
        answers = [running.submit(prompt, max_tokens=10, ignore_eos=True) for prompt in asked]
        answers[20].result(60)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        errors = [answer.exception(60) for answer in answers]
    assert sum(error is None for error in errors) >= 1 and sum(error is not None for error in errors) >= 1
    for answer, error, tokens in zip(answers, errors, wanted, strict=True):
        if error is None:
            assert list(answer.result().token_ids) == tokens
        else:
            assert "lm_head.weight was written to" in str(error)
