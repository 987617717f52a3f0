"""The policies of the grid by name: those of the library, and a pair for images beside texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from neustream.core.policies import POLICIES, NeuStream, NeuStreamLLM, PerModel
from neustream.core.policy import Policy
from neustream.experiment import Prepared
from neustream.experiment.prepared import policy_for

OURS = "priced"
PAIRS: Mapping[str, Callable[[], Policy]] = {
    "neustream + neustream_llm": lambda: PerModel(NeuStreamLLM(), NeuStream(3.0)),
}
"""Rules that no config names."""
NAMES = (*POLICIES, *PAIRS)


def made(prepared: Prepared, name: str) -> Policy:
    """The policy with the parameters of a point's configs."""
    if name in PAIRS:
        return PAIRS[name]()
    return policy_for(prepared.pipelines, name)
