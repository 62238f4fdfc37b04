"""The process that renders chat templates, which come from strangers.

Reads requests and writes answers, one JSON object a line each, until its input ends. Only `data.rendering` starts
it. It imports nothing but the standard library and jinja2, so that it starts at once and its memory limit holds
what a template uses. Templates are given what `transformers.utils.chat_template_utils` gives them, except what
differs from day to day, from call to call or from process to process: they are refused when they ask for it.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 512 * 2**20
"""Bytes of address space."""
LONGEST = 2**20
"""Characters that a template may write."""
GRACE = 1.0
"""Seconds after the time limit at which the process ends itself, should nobody be left to end it."""
ADDRESS = re.compile("0x[0-9a-f]{6}", re.IGNORECASE)
"""Where a function or a generator lies in memory, as it stands in the text that Python makes of one."""


class Changing(Exception):
    """The template asks for what is not the same at every call."""


class TooLarge(Exception):
    """The template writes more than `LONGEST` characters."""


class Output:
    """What a template has written so far, and which of it stands in generation blocks."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        self.spans: list[tuple[int, int]] = []

    def extend(self, pieces: Iterable[str]) -> None:
        """Take pieces one by one; each is taken before the template writes the next."""
        for piece in pieces:
            self.length += len(piece)
            if self.length > LONGEST:
                raise TooLarge
            self.pieces.append(piece)


class Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  (an attribute of jinja2's class)
    environment: Environment

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn a block into a call of `_marked` around its body."""
        self.environment.has_marks = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        text: str = caller()
        output = self.environment.output
        output.spans.append((output.length, output.length + len(text)))
        return text


class Dictionaries:
    """The global `dict` of templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A new dictionary."""
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """A new dictionary with one value for all keys."""
        return dict.fromkeys(keys, value)


class Names(Namespace):
    """The global `namespace` of templates; no name in it begins with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        Namespace.__setitem__(self, name, value)


class Environment(ImmutableSandboxedEnvironment):
    """What one template sees, and what it has written."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=_stable)
        self.output = Output()
        self.has_marks = False
        self.filters |= {"tojson": _as_json, "random": _random}
        self.globals |= {
            "dict": Dictionaries(),
            "namespace": Names,
            "lipsum": _lipsum,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render `template` with `variables` within `seconds`; what was written, or what prevented it."""
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + GRACE)
    try:
        return _rendered(request["template"], request["variables"])
    except Changing as error:
        return {"error": "changing", "reason": str(error)}
    except TooLarge:
        return {"error": "large"}
    except MemoryError:
        return {"error": "memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "reason": f"line {error.lineno}: {error.message}"}
    except Exception as error:  # whatever a stranger's template can raise, is its failure
        return {"error": "failure", "reason": str(error)[:1000] or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _rendered(source: str, variables: dict[str, Any]) -> dict[str, Any]:
    environment, template = _compiled(source)
    output = environment.output = Output()
    output.extend(template.generate(variables))
    return {"text": "".join(output.pieces), "spans": output.spans if environment.has_marks else None}


@lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[Environment, jinja2.Template]:
    environment = Environment()
    return environment, environment.from_string(source)


def _stable(value: Any) -> Any:
    """The value of an expression, if what a template writes of it is the same in every process."""
    if isinstance(value, str) and ADDRESS.search(value):
        raise Changing("where it lies in memory: it writes an address")
    if isinstance(value, str | int | float | None | jinja2.Undefined):
        return value
    if not isinstance(value, list | tuple | dict):
        raise Changing(f"where it lies in memory: it writes a {type(value).__name__}")
    for each in (*value, *value.values()) if isinstance(value, dict) else value:
        _stable(each)
    return value


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own filter, it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(layout: object) -> NoReturn:
    raise Changing(f"today's date, strftime_now({layout!r})")


def _random(values: object) -> NoReturn:
    raise Changing("chance, the filter `random`")


def _lipsum(*args: object, **kwargs: object) -> NoReturn:
    raise Changing("chance, `lipsum()`")


def _require_public(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.TemplateError(f"names in a namespace do not begin with an underscore: {name}")


def main() -> None:
    """Say that it is ready, then answer requests until there are no more.

    A template can neither write files nor leave a core dump.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("{}", flush=True)  # noqa: T201  (the parent reads it)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
