"""Provable bounds on how much any scheduler could serve on time; the proofs are in README.md.

`graphs` bounds requests whose calls are known in advance, `tokens` generations of a language model,
`agents` requests of several such calls.
"""

from neustream.analysis.bounds.agents.upper import agent_bound
from neustream.analysis.bounds.bound import Bound
from neustream.analysis.bounds.graphs.slack import slack_bound
from neustream.analysis.bounds.graphs.tasks import Devices
from neustream.analysis.bounds.graphs.upper import upper_bound
from neustream.analysis.bounds.tokens.upper import token_bound

__all__ = ["Bound", "Devices", "agent_bound", "slack_bound", "token_bound", "upper_bound"]
