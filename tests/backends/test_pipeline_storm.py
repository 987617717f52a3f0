"""Many threads ask a pipeline at once, some of them wrongly: good requests get what stock gives alone."""

from __future__ import annotations

import importlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import neustream as ns

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REQUESTS = 120


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("served_pipelines")


@pytest.fixture(scope="module")
def pipe(bench):
    return bench.tiny()


@pytest.mark.parametrize("policy", ["priced", "edf"])
def test_a_storm_with_wrong_arguments_and_raising_callbacks(bench, pipe, policy):
    stock = bench.stock_images(pipe)
    before = [weight.clone() for weight in pipe.unet.parameters()]
    with ns.serve(pipe, profiles=bench.Flat(), samples=[], progress=False, policy=policy) as service:
        tried = bench.Storm(service, seed=len(policy))
        with ThreadPoolExecutor(12) as threads:
            outcomes = Counter(threads.map(tried.ask, range(REQUESTS)))
        assert service.snapshot().open == 0
        assert torch.equal(service(**bench.call(0, 2, 1.0)).images, stock[0])
    assert set(outcomes) == {"done", "refused", "failed", "cancelled"} and outcomes["done"] > REQUESTS / 2
    assert len(tried.answered) == REQUESTS - outcomes["refused"] and set(tried.answered.values()) == {1}
    assert max(tried.off(stock)) < bench.TOLERANCE
    assert all(map(torch.equal, pipe.unet.parameters(), before))
