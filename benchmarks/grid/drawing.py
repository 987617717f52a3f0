"""Settings drawn at random by a seed, kind after kind, and every policy at them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, TypeVar

from arguments import at_least_one
from policies import add_common_arguments, compare_points

from grid.plan import Part, Point, built
from neustream.config import Experiment, LlmExperiment

Keys = dict[str, Any]
Parts = Mapping[str, Part]
Kinds = Mapping[str, Callable[[Random], tuple[Parts, Keys]]]
"""What draws a setting of a kind, by its name: the models, as `grid.plan` has them, and keys."""
Kind = TypeVar("Kind", bound=Callable[..., Any])
FAMILY = 500
"""How far the seeds of traces of one family of kinds are from those of the next."""


def rounded(draw: Random, low: float, high: float) -> float:
    """A number of two digits, all sizes from `low` to `high` alike."""
    return float(f"{low * (high / low) ** draw.random():.2g}")


def named(*kinds: Kind) -> Mapping[str, Kind]:
    """Kinds by the names of their functions."""
    return {str(kind.__name__).replace("_", " "): kind for kind in kinds}


def drawn(families: Sequence[Kinds], seed: int, count: int, requests: int) -> Iterator[Point]:
    """Settings of one kind after the other; the same ones for a seed, whatever the `count`.

    The settings of each of some families of kinds are numbered on their own: one that is added leaves those of the
    others as they were.
    """
    every = [(number, name) for number, kinds in enumerate(families) for name in kinds]
    for at in range(count):
        turn, place = divmod(at, len(every))
        number, name = every[place]
        kinds = families[number]
        own = turn * len(kinds) + list(kinds).index(name)
        parts, keys = kinds[name](Random(f"{seed} {own}" if number == 0 else f"{seed} {own} {number}"))
        yield _point(name, parts, {"workload.requests": requests, **keys}, 1000 * seed + FAMILY * number + own)


def _point(name: str, parts: Parts, keys: Keys, trace: int) -> Point:
    known = {key: value if isinstance(value, int | float) else _text(value) for key, value in keys.items()}
    known |= {part: _text(parts[part].model_dump()) for part in parts if part}
    models = built(parts, keys, trace)
    return Point(_file_of(models), name, known, trace, models)


def _file_of(models: Mapping[str, Experiment]) -> str:
    """The file of the grid whose policies are compared."""
    texts = [isinstance(model, LlmExperiment) for model in models.values()]
    return "texts" if all(texts) else "both" if any(texts) else "images"


def _text(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def compare_drawn(description: str | None, script: str, families: Sequence[Kinds], requests: int) -> None:
    """The command line of a script that compares policies at drawn settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True, help="what is drawn; one that no rule was tuned on")
    parser.add_argument("--count", type=at_least_one, default=3 * sum(map(len, families)), help="settings")
    parser.add_argument("--requests", type=at_least_one, default=requests, help="requests of each")
    parser.add_argument(
        "--kind", action="append", metavar="TEXT", help="only kinds with this in their name (repeatable)"
    )
    add_common_arguments(parser)
    args = parser.parse_args()
    every = drawn(families, args.seed, args.count, args.requests)
    some = [point for point in every if _asked(point.group, args.kind)]
    command = f"python benchmarks/{script}.py --seed {args.seed} --count {args.count} --requests {args.requests}"
    compare_points(some, args, command, script)


def _asked(name: str, kinds: list[str] | None) -> bool:
    return not kinds or any(text in name for text in kinds)
