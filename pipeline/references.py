"""What stages refer to: other stages, data sources, directories and the hub; checked as they were written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from pipeline.config import PRODUCES, Stage, StageSettings
from pipeline.document import Document, Location
from pipeline.suggestion import suggest
from pipeline.terminal import printable

STAGES: dict[str, type[StageSettings]] = {
    model.model_fields["kind"].default: model for model in get_args(get_args(Stage)[0])
}
"""Stage kind -> its settings."""

HUB = re.compile(
    r"^hub:(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)"
    r"@(?P<revision>(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]*)\Z"
)
"""`hub:owner/name@revision`; as in git, no revision holds two dots."""


def parents(stage: StageSettings, stages: Mapping[str, Any]) -> list[str]:
    """Names of the stages of the same run that a stage takes as inputs."""
    return [reference for reference in stage.roles().values() if reference in stages]


def in_order(stages: Mapping[str, StageSettings], until: Iterable[str] | None = None) -> list[str]:
    """Stage names, every stage after its inputs and otherwise as written.

    Args:
        stages: Stages by name, free of circles.
        until: Leave out what none of these needs.
    """
    ordered: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in ordered:
            return
        for parent in parents(stages[name], stages):
            visit(parent)
        ordered[name] = None

    for name in stages if until is None else until:
        visit(name)
    return list(ordered)


def check(document: Document) -> None:
    """Note every reference that leads nowhere, to the wrong kind or in a circle."""
    stages = _mappings(document.values, "stages")
    sources = _mappings(document.values, "data")
    graph: dict[str, set[str]] = {}
    for name, stage in stages.items():
        settings = STAGES.get(str(stage.get("kind")))
        if settings is None:
            continue
        graph[name] = set()
        for location, role, reference in _references(name, stage, settings.ROLES):
            _check_role(document, location, reference, settings.ROLES[role], stages)
            graph[name].add(reference)
        for location, _, source in _references(name, stage, settings.DATA):
            _check_source(document, location, source, sources)
    for name, each in sources.items():
        cleaned = each.get("prepare")
        against = cleaned.get("decontaminate") if isinstance(cleaned, dict) else None
        for index, other in enumerate(against if isinstance(against, list) else ()):
            _check_source(document, ("data", name, "prepare", "decontaminate", index), str(other), sources)
    for name, stage in stages.items():
        _check_required(document, name, stage)
        _check_names(document, name, stage)
    _check_cycle(document, {name: uses & graph.keys() for name, uses in graph.items()})


def model_name(reference: str) -> str:
    """What an evaluation calls a model: `sft` of `sft`, `runs/a/stages/sft`; `model` of `hub:owner/model@main`."""
    path = reference.partition("@")[0] if reference.startswith("hub:") else reference
    return PurePosixPath(path).name


def _check_required(document: Document, name: str, stage: Mapping[str, Any]) -> None:
    """A gate is about the models of its evaluation, or about its reward stage."""
    required, models, reward = stage.get("require"), stage.get("models"), stage.get("reward")
    if not isinstance(required, dict) or not isinstance(models, list):
        return
    known = [model_name(each) for each in models if isinstance(each, str)]
    known += [model_name(reward)] if isinstance(reward, str) else []
    for model in required:
        if model not in known:
            location = ("stages", name, "require", model)
            what = f"{_dotted(location)}: no model `{printable(str(model))}` is evaluated"
            document.note(location, what + suggest(str(model), known))


def _check_names(document: Document, name: str, stage: Mapping[str, Any]) -> None:
    """Figures of an evaluation are called by its models and its reward stage, so two must not have the same name."""
    models, reward = stage.get("models"), stage.get("reward")
    if stage.get("kind") != "evaluate" or not isinstance(models, list):
        return
    named: dict[str, str] = {}
    locations: list[tuple[Location, Any]] = [
        *((("stages", name, "models", index), reference) for index, reference in enumerate(models)),
        (("stages", name, "reward"), reward),
    ]
    for location, reference in locations:
        if not isinstance(reference, str):
            continue
        model = model_name(reference)
        if model in named:
            first, again = printable(named[model]), printable(reference)
            what = f"`{first}` and `{again}` would both be called `{printable(model)}`"
            hint = "name it once" if first == again else "copy one of them to a directory of another name"
            document.note(location, f"{_dotted(location)}: {what}: {hint}")
        named.setdefault(model, reference)


def _check_role(
    document: Document,
    location: Location,
    reference: str,
    accepts: tuple[str, ...],
    stages: Mapping[str, Any],
) -> None:
    place, shown = _dotted(location), printable(reference)
    if reference in stages:
        produced = PRODUCES.get(str(stages[reference].get("kind")))
        if produced is not None and not set(produced) & set(accepts):
            made, needed = " or ".join(produced), " or ".join(accepts)
            what = f"{place}: the stage `{shown}` makes a {made}, this needs a {needed}"
            document.note(location, what + _fitting(accepts, stages))
    elif reference.startswith("hub:"):
        if not HUB.match(reference):
            document.note(location, f"{place}: `{shown}` is not of the form `hub:owner/name@revision`")
    elif not Path(reference).exists():
        document.note(location, f"{place}: no stage and no path `{shown}`{suggest(reference, stages)}")


def _check_source(document: Document, location: Location, source: str, sources: Mapping[str, Any]) -> None:
    if source not in sources:
        what = f"{_dotted(location)}: no data source `{printable(source)}`{suggest(source, sources)}"
        document.note(location, what)


def _fitting(accepts: tuple[str, ...], stages: Mapping[str, Any]) -> str:
    made = {name: PRODUCES.get(str(each.get("kind")), ()) for name, each in stages.items()}
    names = [name for name, kinds in made.items() if set(kinds) & set(accepts)]
    return f" (one that fits: {', '.join(f'`{printable(name)}`' for name in names)})" if names else ""


def _check_cycle(document: Document, graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(printable(name) for name in reversed(error.args[1]))
        document.note(("stages", error.args[1][-1]), f"stages wait for each other: {circle}")


def _references(name: str, stage: Mapping[str, Any], roles: Iterable[str]) -> Iterator[tuple[Location, str, str]]:
    """Location, role and text of every reference that is text; anything else is for validation to refuse."""
    for role in roles:
        value = stage.get(role)
        if isinstance(value, str):
            yield ("stages", name, role), role, value
        elif isinstance(value, list):
            for index, each in enumerate(value):
                if isinstance(each, str):
                    yield ("stages", name, role, index), role, each
        elif isinstance(value, dict):
            yield from ((("stages", name, role, each), role, each) for each in value)


def _mappings(values: Any, section: str) -> dict[str, dict[str, Any]]:
    """The well-formed members of a section; the rest is for validation to refuse."""
    members = values.get(section) if isinstance(values, dict) else None
    if not isinstance(members, dict):
        return {}
    return {name: each for name, each in members.items() if isinstance(each, dict)}


def _dotted(location: Location) -> str:
    return ".".join(printable(str(each)) for each in location)
