"""From a file and overrides to `RunSettings`; every mistake is reported at once, with its place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline import durable, redaction, references
from pipeline.config import DataSource, RunSettings, StageSettings
from pipeline.document import MAX_BYTES, SCALARS, Document, Location, Problem, override, parse
from pipeline.errors import ConfigError
from pipeline.figures import NAME
from pipeline.references import STAGES
from pipeline.rules import RULES
from pipeline.suggestion import suggest
from pipeline.suites import METHODS, PreferenceSuite, Suite, model_of
from pipeline.terminal import printable

CONFIGURATIONS = (".yaml", ".yml")
UNIONS: dict[str, Mapping[str, type[BaseModel]]] = {"kind": STAGES, "rule": RULES}
"""Setting that tells alternatives apart -> its values, and the settings that each stands for."""
Validated = TypeVar("Validated", bound=BaseModel)


def load(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read, override and check a configuration.

    Args:
        path: A YAML file.
        overrides: `a.b=c`, applied in order.

    Raises:
        ConfigError: One line per mistake: `file:line: setting: what is wrong`.
    """
    document = parse(_read(path), str(path))
    for assignment in overrides:
        override(document, assignment)
    _refuse_secrets(document)
    references.check(document)
    return _validate(document, RunSettings)


def is_configuration(data: str) -> bool:
    """Whether the user named a configuration rather than data."""
    return Path(data).suffix in CONFIGURATIONS


def data_source(source: str, overrides: Sequence[str] = ()) -> DataSource:
    """A data source outside a configuration.

    Args:
        source: What `source` would be in a configuration.
        overrides: Its other settings, as in `format=explicit` or `columns.chosen=better`.

    Raises:
        ConfigError: One line per mistake.
    """
    document = Document("command line", {"source": source})
    for assignment in overrides:
        if "=" not in assignment:
            what = "expected a setting of the data source, as in `format=explicit`"
            hint = "to read several files, quote the glob, as in 'data/*.jsonl'"
            raise ConfigError(what, where=f"command line: {printable(assignment)}", hint=hint)
        override(document, assignment)
    _refuse_secrets(document)
    return _validate(document, DataSource)


def options(model: type[Validated], given: Mapping[str, Any]) -> Validated:
    """Settings that the command line gives as options.

    Args:
        model: What they are to become.
        given: Setting -> value; None stands for an option that was not given.

    Raises:
        ConfigError: One line per mistake.
    """
    return _validate(
        Document("command line", {name: value for name, value in given.items() if value is not None}), model
    )


def recipes() -> Path:
    """The directory of Baton's own configurations: packaged, or beside the packages in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "configs"


def suites(stage: StageSettings) -> dict[str, Suite]:
    """A stage's evaluation suites by data role, `suites.NAME`.

    Raises:
        ConfigError: One cannot be read, two have the same name, or one needs a reward stage that is not given.
    """
    found: dict[str, Suite] = {}
    for reference in (each for setting in stage.SUITES for each in getattr(stage, setting)):
        name, each = suite(reference)
        if f"suites.{name}" in found:
            hint = "the name of a suite is that of its file: rename one"
            raise ConfigError(f"two suites are called `{name}`", where="suites", hint=hint)
        if isinstance(each, PreferenceSuite) and "reward" not in stage.roles():
            raise ConfigError(f"`{name}` measures a reward model: give `reward`, a reward stage", where="suites")
        found[f"suites.{name}"] = each
    return found


def suite(reference: str) -> tuple[str, Suite]:
    """An evaluation suite and its name.

    Args:
        reference: Name of one of Baton's own suites, or a YAML file; paths in it are relative to it, and `${NAME}`
            stands for an environment variable.

    Raises:
        ConfigError: One line per mistake: `file:line: setting: what is wrong`.
    """
    path = Path(reference)
    if not is_configuration(reference):
        own = {each.stem: each for each in (recipes() / "suites").glob("*.yaml")}
        if reference not in own:
            hint = "name one of Baton's suites, or a YAML file"
            raise ConfigError(f"no suite `{printable(reference)}`{suggest(reference, own)}", where="suites", hint=hint)
        path = own[reference]
    if not re.fullmatch(NAME, path.stem):
        hint = "letters, digits and hyphens name a suite: rename the file"
        raise ConfigError(f"`{printable(path.stem)}` is no name of a suite", where=path, hint=hint)
    hint = "correct its name in `suites`, or write the file as docs/evaluation.md says"
    document = parse(_read(path, "suite", hint), str(path))
    model = model_of(document.values)
    if model is None:
        given = document.values.get("method") if isinstance(document.values, dict) else None
        what = "missing" if given is None else f"unknown method `{printable(str(given))}`"
        raise ConfigError(f"method: {what}{suggest(str(given), METHODS)}", where=document.where(("method",)))
    found = _validate(document, model)
    return path.stem, found if found.scheme else _placed(found, path.parent, document)


def _placed(suite: Suite, folder: Path, document: Document) -> Suite:
    """The suite with paths as they are seen from the working directory."""

    def variable(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            what = f"source: the environment variable `{name}` is not set"
            raise ConfigError(what, where=document.where(("source",)), hint=f"export {name}=/where/the/data/is")
        return os.environ[name]

    names = [suite.source] if isinstance(suite.source, str) else suite.source
    placed = [str(folder / re.sub(r"\$\{(\w+)\}", variable, name)) for name in names]
    return suite.model_copy(update={"source": placed[0] if isinstance(suite.source, str) else placed})


def resolved(settings: RunSettings) -> dict[str, Any]:
    """All settings, defaults included, as JSON-able values."""
    return settings.model_dump(mode="json")


def write_resolved(settings: RunSettings, path: Path) -> bool:
    """Write all settings as YAML that `load` reads back to the same settings; returns whether they are news."""
    text = yaml.dump(resolved(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    text = "# All settings of this run, defaults included.\n" + text
    news = not path.is_file() or path.read_bytes() != text.encode()
    durable.write_text(path, text)
    return news


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or our own reader would take for something else."""


for _tag, (_pattern, _first) in SCALARS.items():
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _read(path: Path, kind: str = "configuration", hint: str = "") -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the {kind}: {error.strerror}", where=path, hint=hint) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"byte {error.start} is not UTF-8", where=path) from None


def _validate(document: Document, model: type[Validated]) -> Validated:
    settings = None
    try:
        settings = model.model_validate(document.values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            # a complaint about the whole is about references, which were checked by their place already
            if detail["loc"] or not document.problems:
                _note(document, model, detail)
    if settings is None or document.problems:
        problems = sorted(document.problems, key=_line_number)
        raise ConfigError("\n".join(dict.fromkeys(map(str, problems))))
    return settings


def _refuse_secrets(document: Document) -> None:
    """Settings are stored, and handed on with every model made from them; so none may hold a secret.

    Raises:
        ConfigError: Names each that does, without its value, and nothing else that may be wrong.
    """
    found = []
    for location, text, is_value in redaction.texts(document.values):
        named = is_value and redaction.is_secret(str(location[-1]))
        held = redaction.secret_in(text) or ("a secret, by its name" if named else None)
        if held:
            setting = ".".join(printable(str(each)) for each in location)
            found.append(f"{document.where(location)}: {setting}: holds {held}")
    if found:
        hint = "export it as an environment variable; settings are stored with all that is made from them"
        raise ConfigError("\n".join(dict.fromkeys(found)), hint=hint)


def _note(document: Document, model: type[BaseModel], detail: ErrorDetails) -> None:
    location = _location(document.values, detail["loc"], detail["type"] == "missing")
    setting = ".".join(printable(str(each)) for each in location)
    what = _message(document, model, location, detail) if setting else detail["msg"].removeprefix("Value error, ")
    document.note(location, f"{setting}: {what}" if setting else what)


def _message(document: Document, model: type[BaseModel], location: Location, detail: ErrorDetails) -> str:
    kind, last = detail["type"], str(location[-1])
    if kind == "extra_forbidden":
        known = _settings_at(model, document.values, location[:-1])
        if deeper := _one_deeper(known, last):
            return f"unknown setting; did you mean `{deeper}`?"
        return f"unknown setting{suggest(last, [name for each in known for name in each.model_fields])}"
    if kind == "union_tag_invalid":
        name, given = _discriminator(detail), str(detail["ctx"]["tag"])
        return f"unknown {name} `{printable(given)}`{suggest(given, UNIONS[name])}"
    if kind == "union_tag_not_found":
        name = _discriminator(detail)
        return f"`{name}` is missing{suggest(last, UNIONS[name])}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    value = detail["input"]
    shown = "" if isinstance(value, dict | list) else f", not {printable(repr(value))}"
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}{shown}"


def _discriminator(detail: ErrorDetails) -> str:
    """The setting that tells the alternatives of a union apart."""
    return str(detail["ctx"]["discriminator"]).strip("'")


def _line_number(problem: Problem) -> int:
    """For sorting: problems of the file by line, those of the command line after them."""
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdecimal() else MAX_BYTES


def _location(values: Any, raw: Location, missing: bool) -> Location:
    """An error's location without what pydantic adds: the kind of the stage, the alternative of a union."""
    if len(raw) > 2 and raw[0] == "stages":
        raw = raw[:2] + raw[3:]
    kept: list[str | int] = []
    for key in raw:
        inside = range(len(values)) if isinstance(values, list) else values
        if isinstance(values, list | dict) and key in inside:
            values = values[key]  # type: ignore[index]
            kept.append(key)
    if missing:
        kept.append(raw[-1])
    return tuple(kept)


def _one_deeper(models: Sequence[type[BaseModel]], name: str) -> str:
    """Where a setting stands that was looked for beside the group that it belongs to; empty where it is in none."""
    groups = ((group, field.annotation) for each in models for group, field in each.model_fields.items())
    found = [
        f"{group}.{name}"
        for group, annotation in groups
        for inner in (get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation])
        if isinstance(inner, type) and issubclass(inner, BaseModel) and name in inner.model_fields.keys() - {"name"}
    ]
    return found[0] if found else ""


def _settings_at(model: type[BaseModel], values: Any, location: Location) -> list[type[BaseModel]]:
    """What may stand at a place of a document that is to become `model`."""
    if model is RunSettings and location[:1] == ("stages",):
        values, location = values["stages"][location[1]], location[2:]
        model = STAGES[values["kind"]]
    found = [model]
    for key in location:
        values = values[key]
        # A key that is no setting is a name that the user gave, as of a data source, or a place in a list.
        fields = [each.model_fields[str(key)] for each in found if str(key) in each.model_fields]
        found = [inner for field in fields for inner in _models_in(field.annotation)] or found
        found = [each for each in found if _is_meant(each, values)] or found
    return found


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings that a field holds: itself, or what its alternatives, lists or mappings are of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _is_meant(model: type[BaseModel], values: Any) -> bool:
    """Whether a rule's settings name the rule that `model` stands for."""
    return isinstance(values, dict) and RULES.get(str(values.get("rule"))) is model
