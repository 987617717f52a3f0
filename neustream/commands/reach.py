"""How far policies are from the bound and from hindsight, and which policies those are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from neustream.commands.interrupts import raise_unless_pressed
from neustream.config import Config, experiments_of
from neustream.engine.report import Report
from neustream.errors import ConfigError
from neustream.experiment.clusters import check_rules, contenders
from neustream.experiment.policies import build_policy
from neustream.experiment.prepared import Prepared


@contextlib.contextmanager
def naming(config: Path) -> Iterator[None]:
    """A ConfigError inside names the file, where it does not yet (nor an option)."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        if text.startswith("--") or str(config) in text:
            raise
        raise ConfigError(f"{config}: {text}") from None


def chosen_policies(path: Path, config: Config, chosen: list[str] | None) -> list[str]:
    """The policies to run; all that the config names are checked."""
    names = list(dict.fromkeys(chosen or config.policies))
    for name in dict.fromkeys([*names, *config.policies]):
        try:
            with naming(path):
                for experiment in experiments_of(config):
                    build_policy(experiment, name)
        except KeyboardInterrupt:
            raise_unless_pressed(f"policy {name!r}")
            raise
    if config.cluster is not None:
        with naming(path):
            check_rules(config.cluster)
    return contenders(config.cluster, names)


def reach_of(
    prepared: Prepared,
    bound: bool,
    hindsight: float | None,
    policies: Sequence[str],
    progress: Progress,
    task: TaskID,
) -> Callable[[Report], dict[str, Any]]:
    """What to add to each policy's record: how far it is from the bound and from hindsight, if asked for."""
    if not bound and hindsight is None:
        return lambda report: {}
    if hindsight is not None and prepared.experiments[0].cluster is not None:
        raise ConfigError("--hindsight is for one device, not for a cluster")
    from neustream.analysis.headroom import bound_of, headroom
    from neustream.analysis.hindsight import hindsight as search
    from neustream.analysis.hindsight import starts_of

    most = best = None
    if bound:
        progress.update(task, description="computing the bound")
        most = bound_of(prepared)
    if hindsight is not None:
        progress.update(task, description="searching in hindsight")
        best = search(prepared, hindsight, policies=[*starts_of(prepared), *policies])
    return lambda report: headroom(prepared, report, most, best)
