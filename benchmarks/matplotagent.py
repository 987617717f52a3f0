"""MatPlotAgent as in the artifact's multi-agent experiment, as configs/paper/matplotagent_rtx4090.yaml describes it.

What each call is promised is added here: the config's SLO is of whole requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent_rules import Call

from neustream.config import AgentExperiment, load_config
from neustream.config.agent import ModelCall, ToolCall
from neustream.core.policy import Policy
from neustream.core.steps import Step, StepLatency
from neustream.core.types import Request
from neustream.engine.events import Observer
from neustream.engine.report import Report
from neustream.experiment import Prepared, prepare, simulate
from neustream.profiling.steps import load_steps

CONFIG = Path(__file__).parent.parent / "configs/paper/matplotagent_rtx4090.yaml"


@dataclass(frozen=True)
class Workload:
    """Requests of one setting, and what each of their calls is promised."""

    prepared: Prepared
    calls: Mapping[str, Sequence[Call]]

    @property
    def requests(self) -> Sequence[Request]:
        return self.prepared.requests

    def simulate(self, policy: Policy, observers: Sequence[Observer] = ()) -> Report:
        """Serve them in virtual time."""
        return simulate(self.prepared, policy, observers)


def workload(*, rate: float, cv: float, scale: float, count: int, seed: int | None) -> Workload:
    """The config's requests. A request may take `scale` times what its calls take alone, and the executor's SLOs.

    Args:
        seed: None: the artifact's.
    """
    sets = [f"workload.rate={rate}", f"workload.cv={cv}", f"slo.scale={scale}", f"workload.requests={count}"]
    if seed is not None:
        sets.append(f"workload.seed={seed}")
    config = load_config(CONFIG, sets)
    assert isinstance(config, AgentExperiment)
    steps = {name: load_steps(config.profiles / f"{model.profile}.json") for name, model in config.llms.items()}
    prepared = prepare(config)
    return Workload(prepared, {request.id: _calls(config, request, scale, steps) for request in prepared.requests})


def _calls(config: AgentExperiment, request: Request, scale: float, steps: Mapping[str, StepLatency]) -> list[Call]:
    """What each call of a request is promised, one behind the other."""
    labels = iter([stage.model for stage in request.graph.stages.values() if stage.phase == "prefill"])
    at = request.arrival
    calls: list[Call] = []
    for node in config.agent:
        if isinstance(node, ToolCall):
            at += config.tools[node.tool].slo_s or 0.0
        elif isinstance(node, ModelCall):
            tokens, outputs = request.params[node.llm]["prompt_tokens"], request.params[node.llm]["ends"]
            calls.append(_call(next(labels), at, scale, tokens, outputs, steps[node.llm]))
            at = calls[-1].end
    return calls


def _call(label: str, at: float, scale: float, tokens: int, outputs: int, steps: StepLatency) -> Call:
    """What a call is promised that begins at a time."""
    first = scale * steps.seconds(Step(1, tokens, tokens**2))
    one, other = (steps.seconds(Step(decodes=1, context=context)) for context in (1000, 2000))
    each = (other - one) / 1000
    return Call(label, at, first, tokens, outputs, scale * (one - 1000 * each), scale * each)
