"""YAML text as plain values that remember where they stand, and the overrides that the command line adds.

The YAML read here is the core schema of YAML 1.2: `2e-5` is a number, only `true` and `false` are booleans,
`010` is ten and `12:30` is text. Values come from nodes, not from tags, so no file can construct anything but
plain ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.errors import ConfigError
from pipeline.redaction import is_secret
from pipeline.suggestion import suggest
from pipeline.terminal import printable

MAX_BYTES = 1_000_000
MAX_ALIASES = 100
MAX_VALUES = 100_000
MAX_DEPTH = 32

Location = tuple[str | int, ...]
"""Keys and indices from the top of a document."""

_TAG = "tag:yaml.org,2002:"
SCALARS = {
    f"{_TAG}null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    f"{_TAG}bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    f"{_TAG}int": (re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    f"{_TAG}float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
}
"""Tag -> what a plain scalar of it looks like, and the characters it can begin with."""


@dataclass(frozen=True)
class Problem:
    """One mistake of the user's: where it stands and what it is."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass
class Document:
    """Values with the place of each; `problems` are the mistakes that did not stop the reading."""

    source: str
    values: Any = None
    places: dict[Location, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, location: Location) -> str:
        """The place of a value, or of the nearest thing around it that stands anywhere."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.places:
                return self.places[location[:length]]
        return self.source

    def note(self, location: Location, what: str) -> None:
        """Add a problem with the value at a location."""
        self.problems.append(Problem(self.where(location), what))


def parse(text: str, source: str) -> Document:
    """Read one YAML document.

    Raises:
        ConfigError: Not YAML, too large, or nested or aliased beyond reason.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES:,} bytes", where=source)
    document = Document(source)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"not YAML: {printable(str(error.problem))}", where=f"{source}{line}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {printable(str(error))}", where=source) from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=source) from None
    if node is not None:
        document.values = _Builder(document).value(node, ())
    return document


def override(document: Document, assignment: str) -> None:
    """Apply one `a.b=c`; the value is YAML, list elements are named by their index.

    A key that no setting has is left for validation to name, except where nothing could be said about it
    later: inside a stage or data source that does not exist.
    """
    key, equals, text = assignment.partition("=")
    shown = f"{key}=..." if is_secret(key.rpartition(".")[2]) else assignment
    where = f"command line: {printable(shown)}"
    location: Location = tuple(key.strip().split("."))
    if not equals or not all(location):
        document.problems.append(Problem(where, "expected `setting=value`, as in `stages.dpo.beta=0.2`"))
        return
    try:
        value = parse(text, where).values
    except ConfigError as error:
        document.problems.append(Problem(where, error.what))
        return
    parent = _descend(document, location, where)
    if parent is None:
        return
    container, last = parent
    container[last] = value
    for known in [known for known in document.places if known[: len(location)] == location]:
        del document.places[known]
    document.places[location] = where


class _Loader(yaml.SafeLoader):
    """Composes nodes, resolving plain scalars by the core schema of YAML 1.2."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.aliases = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                mark = self.get_mark()
                raise yaml.MarkedYAMLError(problem=f"more than {MAX_ALIASES} aliases", problem_mark=mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


class _Builder:
    """Turns nodes into values, noting places and duplicate keys."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0

    def value(self, node: Node, location: Location) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or len(location) > MAX_DEPTH:
            raise ConfigError("too many or too deeply nested values", where=self._line(node))
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, location)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return self._sequence(node, location)
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        raise self._refused(node)

    def _mapping(self, node: MappingNode, location: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in values:
                self.document.problems.append(Problem(self._line(key_node), f"duplicate key `{printable(key)}`"))
            self.document.places[(*location, key)] = self._line(key_node)
            values[key] = self.value(value_node, (*location, key))
        return values

    def _sequence(self, node: SequenceNode, location: Location) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.document.places[(*location, index)] = self._line(item)
            values.append(self.value(item, (*location, index)))
        return values

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            raise ConfigError("a key must be text", where=self._line(node))
        return str(node.value)

    def _scalar(self, node: ScalarNode) -> Hashable:
        text = str(node.value)
        if node.tag == f"{_TAG}str":
            return text
        if node.tag not in SCALARS or not SCALARS[node.tag][0].match(text):
            raise self._refused(node)
        try:
            return _CONVERT[node.tag](text)
        except ValueError:  # more digits than Python reads
            raise ConfigError("a number of too many digits", where=self._line(node)) from None

    def _refused(self, node: Node) -> ConfigError:
        return ConfigError(f"the tag `{printable(node.tag)}` does not fit here", where=self._line(node))

    def _line(self, node: Node) -> str:
        source = self.document.source
        return source if source.startswith("command line") else f"{source}:{node.start_mark.line + 1}"


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    found = int(text[2:] if base != 10 else text, base)
    str(found)  # which has a bound that powers of two do not have
    return found


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_CONVERT: dict[str, Callable[[str], Hashable]] = {
    f"{_TAG}null": lambda text: None,
    f"{_TAG}bool": lambda text: text.lower() == "true",
    f"{_TAG}int": _integer,
    f"{_TAG}float": _float,
}


def _descend(document: Document, location: Location, where: str) -> tuple[Any, str | int] | None:
    """The container that an override writes into and its last key, making empty mappings on the way."""
    if not isinstance(document.values, dict):
        document.values = {}
    container: Any = document.values
    for depth, key in enumerate(location):
        step = _step(container, key)
        if step is None:
            inside = ".".join(printable(str(each)) for each in location[:depth])
            document.problems.append(Problem(where, f"`{inside}` has no element `{printable(str(key))}`"))
            return None
        if depth == len(location) - 1:
            return container, step
        if isinstance(container, dict) and container.get(step) is None:
            if depth == 1 and location[0] in ("stages", "data"):
                known = suggest(str(key), container)
                document.problems.append(Problem(where, f"no `{location[0]}.{printable(str(key))}`{known}"))
                return None
            container[step] = {}
        container = container[step]
    return None


def _step(container: Any, key: str | int) -> str | int | None:
    """A key as this container takes it; None when it cannot hold it."""
    if isinstance(container, dict):
        return key
    if isinstance(container, list) and str(key).isdecimal() and int(key) < len(container):
        return int(key)
    return None
