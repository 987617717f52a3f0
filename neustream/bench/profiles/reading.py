"""A profile from its file: tokens put in, overrides made, read by its dialect."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from neustream.bench.plan import Target
from neustream.bench.profiles import from_guidellm, from_inference_perf, from_vllm
from neustream.bench.profiles.dialects import dialect_of
from neustream.bench.profiles.filling import URL, check_filled, filled, known, without_open
from neustream.bench.profiles.flat import Flat
from neustream.bench.profiles.guidellm import Benchmark, Scenario, Spec
from neustream.bench.profiles.inference_perf import InferencePerf
from neustream.bench.profiles.marks import Ignored, Refused, Unrunnable, marked
from neustream.bench.profiles.nop import Nop
from neustream.bench.profiles.overriding import overridden, put_all
from neustream.bench.profiles.parts import base_url
from neustream.bench.profiles.profile import LARGEST, Dialect, Left, Parts, Profile
from neustream.bench.profiles.vllm_bench import VllmBench
from neustream.config.messages import explain
from neustream.config.yaml_file import read_document
from neustream.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Lines = Mapping[tuple[str, ...], int]


@dataclasses.dataclass(frozen=True)
class Given:
    """What is said beside a profile.

    Attributes:
        model, tokenizer, url: they come before what the profile says.
        overrides: `path=value`, each.
        harness: whose dialect it is; None: as its keys tell.
        lenient: whether keys that its tool does not know are left out.
    """

    model: str | None = None
    tokenizer: str | None = None
    url: str | None = None
    overrides: Sequence[str] = ()
    harness: str | None = None
    lenient: bool = False


NOTHING = Given()


def read_profile(path: Path, given: Given = NOTHING) -> Profile:
    """The profile in a file.

    Raises:
        Unrunnable: it asks for something that neustream does not do; key and reason are named.
        ConfigError: it is none, or wrong; it names file, line, key and what is allowed.
    """
    document = read_document(path)
    values = overridden(document.values, given.overrides)
    values = filled(values, known(given.model, given.tokenizer, given.url))
    dialect = dialect_of(path, values, given.harness)
    reader = _Reader(path, document.lines, given)
    try:
        parts = READERS[dialect](reader, without_open(values))
        check_filled(without_open(values), {each.key for each in parts.left})
    except Unrunnable as error:
        raise Unrunnable(f"{path}: {error}") from None
    except ConfigError as error:
        raise ConfigError(_behind(path, error)) from None
    return _profile(path, dialect, parts, given, values)


def _behind(path: Path, error: ConfigError) -> str:
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"


def _profile(path: Path, dialect: Dialect, parts: Parts, given: Given, values: Any) -> Profile:
    for load in (*parts.loads, *(parts.sweep.probes if parts.sweep else ())):
        if load.expected > LARGEST:
            raise ConfigError(f"{path}: {load}: more than {LARGEST:,} requests in a load")
    url = base_url("--base-url", given.url) if given.url else parts.target.url
    target = dataclasses.replace(parts.target, url=url, model=given.model or parts.target.model)
    notes = [] if target.model else ["the first model that the server tells of is asked"]
    told = {
        **vars(parts),
        "target": target,
        "tokenizer": given.tokenizer or parts.tokenizer,
        "notes": [*parts.notes, *notes],
    }
    lacks = () if url else (f"the server's URL: --base-url, or the environment variable {URL}",)
    return Profile(**told, path=path, dialect=dialect, lacks=lacks, values=values)


# -- dialects --------------------------------------------------------------------------------------


class _Reader:
    """Sections out of values, with what pydantic has against them told by line and key."""

    def __init__(self, path: Path, lines: Lines, given: Given) -> None:
        self.path, self.lines, self.given = path, lines, given
        self.left: list[Left] = []
        self.spelt: Callable[[str], str] = str
        """A key as its tool writes it."""

    def section(self, model: type[Model], values: Any) -> Model:
        """The section, with what is ignored in it noted; Unrunnable for a key that is refused."""
        found = self._validated(model, values)
        for each in marked(found):
            key = self.spelt(each.key)
            if isinstance(each.mark, Refused):
                raise Unrunnable(f"{key}: {each.mark.why}")
            assert isinstance(each.mark, Ignored)
            self.left.append(Left(key, each.mark.why))
        return found

    def _validated(self, model: type[Model], values: Any) -> Model:
        values = copy.deepcopy(values)
        while True:
            try:
                return model.model_validate(values)
            except ValidationError as error:
                unknown = [
                    each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"
                ]
                if not self.given.lenient or not unknown:
                    check_filled(_pieces(error), set())
                    raise ConfigError(f"{self.path}: {explain(error, model, self.lines)}") from None
                for place in unknown:
                    key = self.spelt(".".join(_drop(values, place)))
                    self.left.append(Left(key, "the tool does not know it either"))


def _pieces(error: ValidationError) -> dict[str, Any]:
    """The texts that were refused, by their keys."""
    return {
        ".".join(map(str, each["loc"])): each["input"]
        for each in error.errors()
        if isinstance(each["input"], str)
    }


def _drop(values: Any, place: Sequence[int | str]) -> list[str]:
    """Take out a key; parts of its place that are names of a union's branch lead nowhere."""
    at, steps = values, list[str]()
    for part in place[:-1]:
        there = part in at if isinstance(at, dict) else isinstance(part, int)
        if there:
            at = at[part]
            steps.append(str(part))
    del at[place[-1]]
    return [*steps, str(place[-1])]


def _inference_perf(reader: _Reader, values: dict[str, Any]) -> Parts:
    parts = from_inference_perf.parts(reader.section(InferencePerf, values))
    return _with_left(parts, reader.left)


def _vllm(reader: _Reader, values: dict[str, Any]) -> Parts:
    reader.lines = {tuple(map(_underscored, place)): line for place, line in reader.lines.items()}
    reader.spelt = _hyphened
    flags = {_underscored(key): value for key, value in values.items()}
    return _with_left(from_vllm.parts(reader.section(VllmBench, flags)), reader.left)


def _guidellm(reader: _Reader, values: dict[str, Any]) -> Parts:
    if "spec" not in values and "benchmarks" not in values:
        flat = reader.section(Flat, {_underscored(key): value for key, value in values.items()})
        reader.lines = {}  # they are of other keys
        return _with_left(from_guidellm.parts(reader.section(Spec, flat.spec()), ""), reader.left)
    scenario = reader.section(Scenario, values)
    spec = {_underscored(key): value for key, value in scenario.spec.items()}
    spec = put_all(spec, scenario.benchmarks[0] or {}, "benchmarks.0")
    found = []
    for number, changes in enumerate(scenario.benchmarks):
        one = put_all(spec, changes or {}, f"benchmarks.{number}")
        found.append(from_guidellm.parts(reader.section(Benchmark, {"spec": one}).spec, "spec."))
    return _with_left(from_guidellm.joined(found), reader.left)


def _nop(reader: _Reader, values: dict[str, Any]) -> Parts:
    nop = reader.section(Nop, values)
    return _with_left(Parts(Target(url="", model=nop.model_name or "")), reader.left)


def _underscored(key: Any) -> str:
    return str(key).replace("-", "_")


def _hyphened(key: str) -> str:
    return key.replace("_", "-")


def _with_left(parts: Parts, left: Sequence[Left]) -> Parts:
    parts.left = list(dict.fromkeys([*left, *parts.left]))
    return parts


READERS: Mapping[Dialect, Callable[[_Reader, dict[str, Any]], Parts]] = {
    "inference-perf": _inference_perf,
    "guidellm": _guidellm,
    "vllm-benchmark": _vllm,
    "nop": _nop,
}
