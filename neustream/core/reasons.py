"""How the reasons for giving a request up speak of time."""

from __future__ import annotations

import math


def span(seconds: float) -> str:
    """A duration to three decimals of a second; a shorter one in a unit of its own.

    >>> span(4.75), span(0.0004), span(2e-6), span(0.0), span(float("inf"))
    ('4.750 s', '0.4 ms', '2 us', '0 s', 'endless time')
    """
    if math.isinf(seconds):
        return "endless time"
    if seconds >= 0.9995e-3:
        return f"{seconds:.3f} s"
    if seconds >= 0.9995e-4:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us" if seconds >= 1e-8 else "0 s"


def due(left: float) -> str:
    """When something is due that has `left` seconds; a negative number means that its time is over.

    >>> due(4.7), due(-1.809), due(0.0)
    ('due in 4.700 s', 'was due 1.809 s ago', 'due now')
    """
    if left == math.inf:
        return "never due"
    if abs(left) < 1e-8:
        return "due now"
    return f"due in {span(left)}" if left > 0 else f"was due {span(-left)} ago"
