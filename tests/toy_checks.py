"""Checks for the tests of benchmarks/each_class.py, one for each way that a class can turn out."""

from __future__ import annotations

import os
import time


def check(name, phase):
    from each_class import Found, NotBuilt, Refused

    if name == "unbuildable":
        raise NotBuilt("it has no configuration")
    if name == "broken":
        raise ValueError("a bad\nconfiguration")
    phase("stock")
    if name == "stock_dies":
        os._exit(3)
    phase("serve")
    if name == "refused":
        raise Refused("its cache is none")
    if name == "fails":
        raise RuntimeError("the request failed")
    if name == "dies":
        os._exit(4)
    if name == "late":
        raise TimeoutError
    if name == "hangs":
        time.sleep(1000)
    found = {
        "shared": Found("", 1e-6, 1e-3, 2.5),
        "apart": Found("", 0.0, 1e-3, 1.0, "one by one"),
        "other_alone": Found("request 1 is off by 1e-7", 0.0, 1e-3, 2.0),
        "other_together": Found("", 2e-3, 1e-3, 2.0),
        "nan": Found("", float("nan"), 1e-3, 2.0),
    }
    return found[name]
