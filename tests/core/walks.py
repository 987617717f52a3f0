"""Random graphs, and the walk through one as a plain recursive generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

from neustream import Job, Stage, loop, seq, switch
from neustream.core.graph import Loop, Node, Seq, Switch


def walk(node: Node, job: Job) -> Iterator[Stage]:
    """The stages that `job` runs from `node` on; asks as it goes, so step the job between two of them."""
    match node:
        case Stage():
            yield node
        case Seq():
            for child in node.nodes:
                yield from walk(child, job)
        case Loop(until=None):
            for _ in range(node.times(job)):
                yield from walk(node.body, job)
        case Loop():
            while True:
                yield from walk(node.body, job)
                if node.until(job):
                    break
        case Switch():
            yield from walk(node.cases[node.on(job)], job)


def step(job: Job) -> dict[str, int]:
    """What each stage of these graphs returns: how many steps the job has run."""
    return {"steps": job.state.get("steps", 0) + 1}


def _steps(job: Job) -> int:
    return job.state.get("steps", 0)


def counted(stages: Sequence[Stage]) -> st.SearchStrategy[Node]:
    """Graphs of seq and counted loops."""

    def around(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
        seqs = st.lists(nodes, max_size=3).map(lambda some: seq(*some))
        return seqs | st.builds(lambda body, n: loop(body, times=n), nodes, st.integers(0, 3))

    return st.recursive(st.sampled_from(stages), around, max_leaves=5)


def free(stages: Sequence[Stage]) -> st.SearchStrategy[Node]:
    """Graphs of everything: what they do depends on the steps that the job has run (see `step`)."""
    leaf = st.sampled_from(stages)

    def until(first: Stage, rest: Node, n: int, expect: int) -> Loop:
        return loop(seq(first, rest), until=lambda job: _steps(job) >= n, expect=expect)

    def around(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
        few = st.integers(0, 3)
        return (
            st.lists(nodes, max_size=3).map(lambda some: seq(*some))
            | st.builds(lambda body, n: loop(body, times=n), nodes, few)
            | st.builds(lambda body, n: loop(body, times=lambda job: _steps(job) % (n + 1), expect=n), nodes, few)
            | st.builds(until, leaf, nodes, st.integers(0, 8), few)
            | st.builds(lambda a, b: switch(lambda job: _steps(job) % 2, {0: a, 1: b}, likely=1), nodes, nodes)
        )

    return st.recursive(leaf, around, max_leaves=5)
