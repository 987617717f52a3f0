"""The policies that come with the library, by the name that configs and `--policy` use.

To add one: write a frozen dataclass with `decide` in a file of its own, and name it here.
"""

from __future__ import annotations

from collections.abc import Callable

from neustream.core.policies.clockwork import Clockwork
from neustream.core.policies.edf import EDF
from neustream.core.policies.fcfs import FCFS
from neustream.core.policies.least_laxity import LeastLaxity
from neustream.core.policies.neustream import NeuStream
from neustream.core.policies.neustream_llm import NeuStreamLLM
from neustream.core.policies.per_model import PerModel
from neustream.core.policies.priced import Priced
from neustream.core.policies.priced_steps import PricedSteps
from neustream.core.policies.priority import Priority
from neustream.core.policies.sarathi import Sarathi
from neustream.core.policies.serial import Serial
from neustream.core.policies.slack_ranked import SlackRanked
from neustream.core.policies.static import Static
from neustream.core.policies.symphony import Symphony
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policy import Policy

POLICIES: dict[str, Callable[..., Policy]] = {
    "serial": Serial,
    "static": Static,
    "fcfs": FCFS,
    "edf": EDF,
    "least_laxity": LeastLaxity,
    "clockwork": Clockwork,
    "symphony": Symphony,
    "slack_ranked": SlackRanked,
    "neustream": NeuStream,
    "neustream_llm": NeuStreamLLM,
    "priority": Priority,
    "sarathi": Sarathi,
    "priced": Priced,
}
"""The rules by the names that configs and the command know them by."""
DEFAULT = "priced"
"""The policy that is meant where none is named, and by the name "default"."""

__all__ = [
    "DEFAULT",
    "EDF",
    "FCFS",
    "POLICIES",
    "Clockwork",
    "LeastLaxity",
    "NeuStream",
    "NeuStreamLLM",
    "PerModel",
    "Priced",
    "PricedSteps",
    "Priority",
    "Sarathi",
    "Serial",
    "SlackRanked",
    "Static",
    "Symphony",
    "TokenDeadlines",
]
