"""Layouts of the user's own: `format: module:function` names a function that turns one record into a known layout.

A configuration alone never runs code. The function must be what an installed distribution declares as an entry point
of the group `baton.formats`, or be named on the command line; until one of the two is known, its module is not
imported.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from data.findings import ADAPTER_FAILED, LEFT_OUT_BY_ADAPTER, MIXED_LAYOUT, WRONG_TYPE, BadRow, cut, shown
from data.formats import Format, Record, detect
from data.schema import Row
from pipeline.errors import ConfigError

GROUP = "baton.formats"
REFERENCE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")
Adapter = Callable[[dict[str, Any]], dict[str, Any] | None]
"""A record as a plain dict in; a dict in a known layout out, or None to leave the record out."""

_allowed: set[str] = set()


def is_adapter(name: str) -> bool:
    """Whether the name of a format is a reference to a function."""
    return ":" in name


def allow(reference: str) -> None:
    """Allow a function in this process, as naming it on the command line does.

    Raises:
        ConfigError: not `module:function`.
    """
    _parts(reference)
    _allowed.add(reference)


def find(reference: str) -> Format:
    """The function as a format. Its results are all in the layout of the first, which decides the kind of row.

    Args:
        reference: `module:function`.

    Raises:
        ConfigError: the function is neither installed nor allowed, or cannot be imported.
    """
    reading = _Reading(reference, _function(reference))
    return Format(reference, None, frozenset(), reading.row, facts=True)


def digest(reference: str) -> str:
    """The sha256 of the source file that the function is written in.

    Raises:
        ConfigError: as `find`, or there is no source file.
    """
    function = _function(reference)
    name = getattr(sys.modules[function.__module__], "__file__", None)
    try:
        return hashlib.sha256(Path(name or "").read_bytes()).hexdigest()
    except OSError as error:
        what = f"the source of adapter `{reference}` cannot be read: {cut(str(error))}"
        raise ConfigError(what, hint="an adapter is a Python file, so that its digest can be recorded") from error


class _Reading:
    """One reading of a source: the function, and the layout of its first result."""

    def __init__(self, reference: str, function: Adapter) -> None:
        self._reference = reference
        self._function = function
        self._layout: Format | None = None

    def row(self, record: Record, origin: str) -> Row:
        result = self._result(record, origin)
        if self._layout is None:
            self._layout = detect(result, "auto", f"{origin}, as `{self._reference}` returned it")
        if not self._layout.columns <= result.keys():
            columns = cut(", ".join(map(str, result)))
            what = f"{self._reference} returned the columns {columns}; before, it was `{self._layout.name}`"
            raise BadRow(MIXED_LAYOUT, what, where=origin, hint="return one layout for all rows")
        return self._layout.parse(result, origin)

    def _result(self, record: Record, origin: str) -> dict[str, Any]:
        try:
            # A copy: what the function changes is still reported as it stands in the file.
            result = self._function(deepcopy(dict(record)))
        except (Exception, SystemExit) as error:
            what = f"{self._reference}: {type(error).__name__}: {cut(str(error))}"
            raise BadRow(ADAPTER_FAILED, what, where=origin) from error
        if result is None:
            raise BadRow(LEFT_OUT_BY_ADAPTER, where=origin)
        if not isinstance(result, dict):
            what = f"{self._reference} returned {shown(result)} (expected a dict or None)"
            raise BadRow(WRONG_TYPE, what, where=origin, hint="return a dict in a known layout, or None")
        return result


def _function(reference: str) -> Adapter:
    module_name, function_name = _parts(reference)
    if reference not in _allowed and reference not in _installed():
        raise ConfigError(
            f"adapter `{reference}` is neither installed nor named on the command line",
            hint=f"install a package that declares it as an entry point of `{GROUP}`, or add --adapter {reference}",
        )
    try:
        found = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:
        what = f"adapter `{reference}` cannot be imported: {type(error).__name__}: {cut(str(error))}"
        raise ConfigError(what, hint="correct it, and install it where Baton is installed") from error
    if not inspect.isfunction(found):
        what = f"adapter `{reference}`: `{function_name}` is {'missing' if found is None else 'not a function'}"
        raise ConfigError(what, hint=f"define `def {function_name}(row)` in {module_name}")
    return found


def _parts(reference: str) -> tuple[str, str]:
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"adapter {shown(reference)} (expected module:function)", hint="for example my_pairs:adapt")
    return match["module"], match["function"]


def _installed() -> set[str]:
    return {"".join(each.value.split()) for each in entry_points(group=GROUP)}
