"""What Llumnix calls freeness: blocks that are free for each request of an instance.

Sun et al., Llumnix: Dynamic Scheduling for Large Language Model Serving, OSDI'24; the formulas
are those of its artifact.
"""

from __future__ import annotations

import math

from neustream.cluster.fleet import Fleet, Instance
from neustream.core.outlook import Outlook, TextOutlook

WATERMARK = 0.01
"""Share of the blocks that vLLM keeps free."""


def text_of(outlook: Outlook) -> TextOutlook:
    """The language model of an instance; one without anything, if it has none."""
    return outlook.texts[0] if outlook.texts else TextOutlook("")


def free_blocks(text: TextOutlook) -> float:
    """Blocks that are free, less the watermark and what waiting prompts will take."""
    if not text.blocks:
        return math.inf
    return text.free - WATERMARK * text.blocks - text.waiting_blocks


def freeness(text: TextOutlook, reserve: float = 0.0) -> float:
    """For dispatching and scaling: inf without requests. `reserve`: blocks that do not count."""
    requests = text.decodes + text.prompts
    return math.inf if not requests else (free_blocks(text) - reserve) / requests


def freeness_of_running(text: TextOutlook, reserve: float = 0.0) -> float:
    """For moving: the waiting requests count as one."""
    waiting = text.prompts > 0
    requests = text.decodes + waiting
    return math.inf if not requests else (free_blocks(text) - reserve) / requests


def reserve_of(
    fleet: Fleet, instance: Instance, headroom: float, classes: tuple[str, ...]
) -> float:
    """Blocks that are kept for the growth of requests of some classes of promises there."""
    if not headroom or not classes:
        return 0.0
    some = any(place.asked.slo.name in classes for place in fleet.requests(instance.name))
    return headroom if some else 0.0
