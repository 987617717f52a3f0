"""YAML as configs use it: read strictly, with the line of every key, and never without an end.

More than YAML 1.1 says: a key given twice is an error, `1e-3` is a number, dates are texts. Less: a file is
at most `LARGEST` bytes, `DEEPEST` levels and `MOST` values (what anchors repeat counts each time), and
an anchor cannot contain itself. Merge keys (`<<: *name`, `<<: [*one, *other]`) work as YAML has them:
what a section says itself goes before what it merges, the first of a list before the others.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from neustream.errors import ConfigError

LARGEST = 2**20
DEEPEST = 50
MOST = 100_000
DIGITS = 100

MERGE = "tag:yaml.org,2002:merge"
EQUALS = "tag:yaml.org,2002:value"

Place = tuple[str, ...]
"""Keys from the top of a file to a value; entries of lists by their number."""


@dataclass
class Document:
    """What a file says, and on which line it says it."""

    values: dict[str, Any]
    lines: dict[Place, int] = field(default_factory=dict)


def read_document(path: Path | str) -> Document:
    """Read a file that holds one mapping.

    Raises:
        ConfigError: it names the file, the line where there is one, and what is allowed.
    """
    path = Path(path)
    loader = _loader_of(str(path), _text_of(path))
    values = _constructed(str(path), loader)
    if not isinstance(values, dict):
        what = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{path}: expected a mapping at the top, got {what}")
    return Document(values, loader.lines)


def parse_value(where: str, text: str) -> Any:
    """The value that a text is in YAML; ConfigError that begins with `where`."""
    return _constructed(where, _loader_of(where, text))


def _text_of(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ConfigError(f"{path}: not a regular file")
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{str(path)!r}: {error}") from None
    if len(raw) > LARGEST:
        raise ConfigError(f"{path}: larger than {LARGEST} bytes, which is the most that a config may have")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}") from None


def _loader_of(where: str, text: str) -> _Loader:
    try:
        return _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{where}: line {line}: character {error.character:#06x} is not allowed") from None


def _constructed(where: str, loader: _Loader) -> Any:
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{where}: {_told(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {error}") from None
    finally:
        loader.dispose()


def _told(error: yaml.MarkedYAMLError) -> str:
    """Line and problem of an error that YAML tells on several lines."""
    mark = error.problem_mark or error.context_mark
    line = "" if mark is None else f"line {mark.line + 1}: "
    parts = [part for part in (error.context, error.problem) if part]
    return line + " ".join(", ".join(parts).split())


class _Loader(yaml.SafeLoader):
    """A safe loader that counts, and remembers lines."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: dict[Place, int] = {}
        self._depth = 0

    def get_single_node(self) -> Node | None:
        node = super().get_single_node()
        if node is not None:
            _Size().of(node)
            _note_lines(node, (), self.lines)
        return node

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ConstructorError(None, None, f"deeper than {DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node: MappingNode = super().compose_mapping_node(anchor)
        seen: dict[Hashable, int] = {}
        for key, _ in node.value:
            name = self._name(key)
            if name in seen:
                first = f"(first on line {seen[name]})"
                hint = "; merge several with <<: [*one, *other]" if name == "<<" else ""
                raise ConstructorError(None, None, f"key {name!r} is given twice {first}{hint}", key.start_mark)
            if name is not None:
                seen[name] = key.start_mark.line + 1
        return node

    def _name(self, key: Node) -> Hashable:
        """What a key is, or None for what cannot be one."""
        if key.tag == MERGE:
            return "<<"
        name: Hashable = self.construct_object(key) if isinstance(key, ScalarNode) else None
        return name

    def flatten_mapping(self, node: MappingNode) -> None:
        """Put what a mapping merges in front of what it says itself (PyYAML's own way depends on its version)."""
        found: dict[Hashable, tuple[Node, Node]] = {}
        own = [pair for pair in node.value if pair[0].tag != MERGE]
        for key, value in node.value:
            for source in _merged(node, value) if key.tag == MERGE else ():
                self.flatten_mapping(source)
                for pair in source.value:
                    found.setdefault(self._name(pair[0]) or id(pair[0]), pair)
        found |= {self._name(pair[0]) or id(pair[0]): pair for pair in own}
        node.value = list(found.values())

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        if isinstance(node, ScalarNode):
            _check_scalar(node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"{_cut(node.value)} is no {kind}: {error}", node.start_mark) from None


def _merged(node: MappingNode, value: Node) -> list[MappingNode]:
    """The mappings that a merge key names."""
    sources: list[Node] = value.value if isinstance(value, SequenceNode) else [value]
    for source in sources:
        if not isinstance(source, MappingNode):
            kind = "list" if isinstance(source, SequenceNode) else "scalar"
            problem = f"<< merges a mapping or a list of mappings, got a {kind}"
            raise ConstructorError(None, None, problem, source.start_mark)
    return [source for source in sources if isinstance(source, MappingNode)]


class _Size:
    """How many values a node stands for, with what its anchors repeat."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def of(self, node: Node) -> int:
        known = self._known.get(id(node))
        if known == 0:
            raise ConstructorError(None, None, "an anchor that contains itself", node.start_mark)
        if known is not None:
            return known
        self._known[id(node)] = 0
        size = 1 + sum(self.of(inner) for inner in _inside(node))
        if size > MOST:
            raise ConstructorError(None, None, f"more than {MOST} values, anchors repeated", node.start_mark)
        self._known[id(node)] = size
        return size


def _inside(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [inner for pair in node.value for inner in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _note_lines(node: Node, place: Place, lines: dict[Place, int]) -> None:
    """The line of each key; of what is merged, the line where it stands, unless it is overridden."""
    if isinstance(node, SequenceNode):
        for at, inner in enumerate(node.value):
            lines.setdefault((*place, str(at)), inner.start_mark.line + 1)
            _note_lines(inner, (*place, str(at)), lines)
        return
    if not isinstance(node, MappingNode):
        return
    merged: list[Node] = []
    for key, value in node.value:
        if key.tag == MERGE:
            merged += value.value if isinstance(value, SequenceNode) else [value]
        elif isinstance(key, ScalarNode):
            lines.setdefault((*place, key.value), key.start_mark.line + 1)
            _note_lines(value, (*place, key.value), lines)
    for value in merged:
        _note_lines(value, place, lines)


def _check_scalar(node: ScalarNode) -> None:
    """What is no text, or longer than any number that a config needs."""
    if node.tag == EQUALS:  # YAML 1.1 gives a lone = a meaning that nobody uses
        node.tag = "tag:yaml.org,2002:str"
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float") and len(node.value) > DIGITS:
        problem = f"a number of {len(node.value)} characters, at most {DIGITS} are allowed: {_cut(node.value)}"
        raise ConstructorError(None, None, problem, node.start_mark)
    if bad := re.search("[\0\ud800-\udfff]", node.value):
        problem = f"character {ord(bad[0]):#06x} is not allowed in a text"
        raise ConstructorError(None, None, problem, node.start_mark)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+$"), list("-+.0123456789")
)
