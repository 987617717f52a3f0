"""Agents: graphs that call the other models of a service, and tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from neustream.core.entry import Entry
from neustream.core.events import Emitted, Update
from neustream.core.graph import Graph, Node, Seq, Switch
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.node import CallResult
from neustream.core.nodes import call
from neustream.core.types import SLO
from neustream.engine.answers import Result
from neustream.engine.events import Observer
from neustream.errors import BackendError, GraphError, NeustreamError, nearest, shown, told
from neustream.service.graphs import run_of
from neustream.service.mount import Call, Device, Host, Instance, Mount, Reader, Shaped, Speaking

Arguments = Callable[[Job], Mapping[str, Any]]
"""The arguments of a call of a model, as its `submit` takes them, from the job that gets there."""

CALL = "~call"
"""The parameter that holds what a model made of the arguments of a call."""


class Asked(dict[str, Any]):
    """The parameters of a run.

    Attributes:
        calls: what models made of its calls, by leg and branch, in order; before each the number of outputs
            that the run had made by then.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__(params)
        self.calls: dict[tuple[str, str], list[tuple[int, Call]]] = {}


class Model:
    """Another model of the service, as an agent may call it."""

    def __init__(self, name: str, mount: Mount) -> None:
        self.name = name
        self._mount = mount
        self.stages: set[str] = set()
        """Those that calls of it go through."""
        self.opened: list[Sequence[Instance]] = []
        """What its devices serve for these calls, beside what they served before."""
        self.calls: set[str] = set()
        """Their names."""

    @property
    def speaks(self) -> bool:
        """Whether what comes of its calls is a text."""
        return isinstance(self._mount, Speaking) and self._mount.tokenizer is not None

    def call(self, name: str, arguments: Arguments, *, like: Mapping[str, Any], slo: SLO | None = None) -> Seq:
        """A call of the model, as a node; the state gets its result (a `Completion`) under `name`.

        Args:
            arguments: asked when the job gets there.
            like: arguments that are expected while they cannot be asked; the model checks them now.
            slo: what the call is promised in place of what the request is.

        Raises:
            BackendError: the model cannot be called by agents, `arguments` is no function, or `like` no
                mapping by name.
            RequestError: it cannot serve `like`.
        """
        if not callable(arguments):
            raise BackendError(f"call {shown(name)}: arguments must be a function of the job, got {shown(arguments)}")
        like = _named(name, "like", like)
        if isinstance(self._mount, Shaped):
            self.opened.append(self._mount.learn(like))
        asked = self._mount.request(**like)
        if not isinstance(asked, Call):
            asked.over()
            raise BackendError(f"model {self.name!r} cannot be called by an agent: its requests are probed first")
        asked.over()
        graph, expected = asked.graph, {**asked.params, CALL: asked}
        self.stages |= set(graph.stages)
        self.calls.add(name)
        params = partial(self._params, name, graph, arguments)
        return call(graph, name, slo=slo, params=params, expect=lambda job: expected, result=_result, apart=True)

    def _params(self, name: str, graph: Graph, arguments: Arguments, job: Job) -> Mapping[str, Any]:
        """What the call `name` reads as `job.params`."""
        asked = self._mount.request(**_named(name, "what arguments returns", arguments(job)))
        asked.over()
        if not isinstance(asked, Call) or asked.graph is not graph:
            differs = "it differs from its `like` in more than content, as in size, guidance or number"
            raise BackendError(f"model {self.name!r} cannot serve call {name!r}: {differs}")
        if isinstance(job, Entry) and isinstance(job.request.params, Asked):
            job.request.params.calls.setdefault((name, job.branch), []).append((job.root.outputs, asked))
        return {**asked.params, CALL: asked}


def _named(call: str, what: str, given: Any) -> Mapping[str, Any]:
    """Arguments of a model; BackendError for anything but a mapping by name."""
    if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        return given
    raise BackendError(f"call {shown(call)}: {what} must be a mapping from names of arguments, got {shown(given)}")


def _result(job: Job, came: CallResult) -> Any:
    """What a model makes of the outputs of a call."""
    asked: Call = job.params[CALL]
    outputs = came.outputs
    emitted = [
        Emitted(job.id, index, asked.reads(update), age, age)
        for index, (update, age) in enumerate(zip(outputs, came.ages_s, strict=True))
    ]
    last = outputs[-1] if outputs else dict(job.state)
    ended = Result(job.id, "done", "", last, came.seconds, came.on_time, waited_s=came.waited_s)
    return asked.value(ended, emitted)


class Models(Mapping[str, Model]):
    """The other models of a service, by name."""

    def __init__(self, mounts: Mapping[str, Mount]) -> None:
        self._models = {name: Model(name, mount) for name, mount in mounts.items()}

    def __getitem__(self, name: str) -> Model:
        if name not in self._models:
            raise BackendError(f"no model {shown(name)}; {nearest(str(name), self._models)}")
        return self._models[name]

    def __iter__(self) -> Any:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


class AgentMount:
    """A graph that calls the other models of its service, and tools.

    Args:
        build: makes the graph from the other models, once those are open.
    """

    observers: Sequence[Observer] = ()
    kv_caches: Mapping[str, KVCache] = {}
    step_tokens: int | None = None
    graph: Graph
    ends_in: frozenset[str] = frozenset()
    """Calls of language models of which every run makes one, as the last thing that it does."""

    def __init__(self, build: Callable[[Models], Graph]) -> None:
        self._build = build
        self._others: Mapping[str, Mount] = {}
        self.opened: Mapping[str, Sequence[Sequence[Instance]]] = {}
        """By model, what its devices serve for the calls of this agent beside what they served before."""

    def join(self, others: Mapping[str, Mount]) -> None:
        """The other models of the service; asked before anything is opened."""
        self._others = {name: mount for name, mount in others.items() if not isinstance(mount, AgentMount)}

    @property
    def device(self) -> str:
        return next((mount.device for mount in self._others.values()), "cpu")

    def check(self, name: str) -> None:
        if not callable(self._build):
            raise BackendError(f"{name!r}: an agent is a function that makes its graph, got {shown(self._build)}")

    def open(self, name: str, devices: Sequence[Device], host: Host) -> Sequence[Instance]:
        models = Models(self._others)
        try:
            graph = self._build(models)
        except NeustreamError:
            raise
        except Exception as error:
            raise BackendError(f"making the graph of agent {name!r} raised {told(error)}") from error
        if not isinstance(graph, Graph):
            raise BackendError(f"an agent's graph is a neustream.Graph, got {shown(graph)}")
        called = {stage for model in models.values() for stage in model.stages}
        self.opened = {name: model.opened for name, model in models.items() if model.opened}
        tools = {stage.name: stage for stage in graph.stages.values() if stage.tool is not None}
        for stage in graph.stages:
            if stage not in called and stage not in tools:
                raise GraphError(
                    f"graph {graph.name!r}: stage {stage!r} is no tool, and of no model that the agent calls"
                )
        self.graph = graph
        speaking = [model.calls for model in models.values() if model.speaks]
        self.ends_in = last_calls(graph, frozenset().union(*speaking))
        return [Instance({}, {}, tools=tools) for _ in devices]

    def request(self, params: Mapping[str, Any] | None = None, /, **more: Any) -> Call:
        """A run of the graph with `params`, given as a mapping or by name; its answer is the state."""
        run = run_of(self.graph, params, more, _raw)
        asked = Asked(run.params)
        return replace(run, params=asked, reader=partial(Told, asked))

    def rehearsal(self) -> Sequence[Call]:
        return ()

    def close(self) -> None:
        self._others = {}


def _raw(output: Emitted) -> Update:
    return output.update


class Told:
    """A reader of one run's outputs: the call and the branch of each, and what it is.

    `output` is what an iteration over the model's own answer gives; of what no model of the service
    made, the update itself.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._open: dict[tuple[str, str], tuple[Call, Reader]] = {}
        self.made: Call | None = None
        """The call that made the output before, if a model of the service did."""

    def __call__(self, output: Emitted) -> Mapping[str, Any]:
        where = output.leg, output.branch
        if not output.place:
            self._begin(where, output.index)
        self.made, reader = self._open.get(where, (None, None))
        told = _raw(output) if reader is None else reader(replace(output, index=output.place))
        return {"call": output.leg, "branch": output.branch, "output": told}

    def _begin(self, where: tuple[str, str], index: int) -> None:
        """A call's first output, number `index` of the run: the latest call that had begun by then made it.

        Those before it may have made none, as in a branch that was ended.
        """
        made = [call for outputs, call in self._asked.calls.get(where, ()) if outputs <= index]
        if made and made[-1].reader is not None:
            self._open[where] = made[-1], made[-1].reader()
        else:
            self._open.pop(where, None)


def last_calls(graph: Graph, names: frozenset[str]) -> frozenset[str]:
    """Calls among `names` of which each run of a graph makes one in the end, and once; none if it may end otherwise."""
    found = _last(graph.root)
    ends = {node.call.name for node in found if isinstance(node, Seq) and node.call is not None}
    if len(found) != len([node for node in graph.nodes if _call_name(node) in ends]) or not ends <= names:
        return frozenset()
    return frozenset(ends) if all(_call_name(node) for node in found) else frozenset()


def _last(node: Node) -> list[Node]:
    """What a node may end with: calls with a result, or what is none."""
    if isinstance(node, Switch):
        return [last for case in node.cases.values() for last in _last(case)]
    if isinstance(node, Seq) and not _call_name(node) and node.nodes:
        return _last(node.nodes[-1])
    return [node]


def _call_name(node: Node) -> str:
    """The name of a call that keeps its result; "" of any other node."""
    if isinstance(node, Seq) and node.call is not None and node.call.result is not None:
        return node.call.name
    return ""
