"""A model backend that needs numpy alone, named in configs as `kind: toy_backend:make`.

Two stream modules: `draw` (looped) adds one to a vector, `decode` doubles it. Options:

    step_s        seconds that a step of `draw` takes (it sleeps)
    marker        a file that is written once a request of the workload (not a sample) was drawn
    limit         the largest batch that fits "memory"
    fault, at     what the step of the workload's request number `at` does: raise, short, dict, nan
    device_name   what profiles are labelled with
    reject        the number of a request that the backend refuses
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from neustream.errors import BackendError


def make(options, device):
    return Toy(dict(options), device)


class Toy:
    model_name = "toy"
    dtype = "float64"
    out_of_memory = (MemoryError,)

    def __init__(self, options, device):
        self.device_name = options.get("device_name", "toy device")
        self.reject = options.get("reject")
        self.modules = {"draw": Draw(options), "decode": Decode()}

    def params(self, at):
        return {"number": at}

    def check(self, params):
        if params["number"] == self.reject:
            raise BackendError(f"number must not be {self.reject}")

    def sync(self):
        pass

    def image(self, output):
        return None


def make_chat(options, device):
    return Chat(dict(options), device)


class Chat(Toy):
    """A language model whose generations end after the outputs that `lengths` say."""

    def __init__(self, options, device):
        super().__init__(options, device)
        self.lengths = {}
        self.modules = dict.fromkeys(("llm.prefill", "llm.decode", "llm"), self)

    def load(self, device):
        pass

    def step(self, inputs):
        return [{"ended": one.outputs + 1 >= self.lengths[one.id]} for one in inputs]


class Draw:
    def __init__(self, options):
        self.step_s = options.get("step_s", 0.0)
        self.marker = options.get("marker")
        self.limit = options.get("limit", 1000)
        self.fault, self.at = options.get("fault"), options.get("at")

    def load(self, device):
        pass

    def step(self, inputs):
        if len(inputs) > self.limit:
            raise MemoryError(f"{len(inputs)} do not fit")
        time.sleep(self.step_s)
        served = [one for one in inputs if not one.id.startswith("sample-")]
        if served and self.marker:
            Path(self.marker).touch()
        updates = [{"x": one.state.get("x", np.zeros(3)) + 1.0} for one in inputs]
        if not any(one.params["number"] == self.at for one in served):
            return updates
        if self.fault == "raise":
            raise ValueError("the toy broke")
        if self.fault == "short":
            return updates[1:]
        if self.fault == "dict":
            return {"x": 0.0}
        assert self.fault == "nan", self.fault
        for one, update in zip(inputs, updates, strict=True):
            if one.params["number"] == self.at:
                update["x"][1] = np.nan
        return updates


class Decode:
    def load(self, device):
        pass

    def step(self, inputs):
        return [{"image": 2.0 * one.state["x"]} for one in inputs]
