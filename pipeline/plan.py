"""What would run, and why: each stage is compared with the manifest of its last run.

A hard key decides: the digest of what a stage computes from (its settings, its inputs' contents, its data).
Source code and environment are a soft key: a difference is a warning, and a reason only when asked to be
strict. Inputs enter by content, so a stage that was run again and came out the same leaves the stages after
it valid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline import checkpoints, checks, fingerprint, inputs, loader, references
from pipeline import manifest as manifests
from pipeline.checkpoints import Maker
from pipeline.config import DataSource, RunSettings, StageSettings
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError, OtherVersionError
from pipeline.manifest import Manifest
from pipeline.store import RunDirectory
from pipeline.suggestion import suggest
from pipeline.terminal import printable

_WITHOUT_EFFECT = frozenset({"tokens_per_batch", "gradient_checkpointing", "device", "require"})
"""Settings that say how to compute or what to ask of the result, not what to compute; where it was computed is in the
environment."""

DataSettings = Mapping[str, Mapping[str, Any]]
"""Data role -> settings and digest."""


class Cause(StrEnum):
    """Why a stage runs."""

    NEVER_RAN = "never ran"
    CONFIG = "config"
    INPUT = "input"
    DATA = "data"
    DAMAGED = "output damaged"
    OTHER_VERSION = manifests.OTHER_VERSION
    PARENT = "parent will run"
    FORCED = "forced"
    CODE = "code"
    ENVIRONMENT = "environment"


SOFT = frozenset({Cause.CODE, Cause.ENVIRONMENT})


@dataclass(frozen=True)
class Reason:
    """One difference between what a stage was made from and what it would be made from now."""

    cause: Cause
    subject: str = ""
    """The setting, role, file, stage or library."""
    old: str = ""
    new: str = ""

    def __str__(self) -> str:
        subject = printable(self.subject)
        if self.cause in (Cause.NEVER_RAN, Cause.FORCED):
            return self.cause
        if self.cause is Cause.OTHER_VERSION:
            return printable(self.new, None)
        if self.cause is Cause.PARENT:
            return f"{self.cause}: {subject}"
        if self.cause is Cause.DAMAGED:
            return f"{self.cause}: {subject}: {printable(self.new, None)}, expected {printable(self.old, None)}"
        return f"{self.cause}{f' {subject}' if subject else ''}: {short(self.old)} -> {short(self.new)}"


@dataclass(frozen=True)
class Wanted:
    """What a stage would be made from now."""

    settings: dict[str, Any]
    """All settings, and the run's seed, device and dtype."""
    behaviour: dict[str, Any]
    """The settings that results depend on."""
    data: dict[str, dict[str, Any]]
    """Data role -> settings and digest."""
    artifacts: dict[str, Artifact]
    """Input role -> what it resolved to."""
    unknown: dict[str, Reason] = field(default_factory=dict)
    """Input role -> why its content is not known yet."""

    @property
    def key(self) -> str:
        """The hard key; inputs that are not known yet are left out."""
        digests = {role: artifact.digest for role, artifact in self.artifacts.items()}
        return hard_key(self.behaviour, digests, self.data)


@dataclass(frozen=True)
class Decision:
    """Whether a stage runs."""

    stage: str
    kind: str
    run: bool
    reasons: tuple[Reason, ...]
    """Why it runs, or why it would if it were strict: then they are warnings."""
    wanted: Wanted
    maker: Maker
    """As whom the stage knows its own checkpoints."""
    after: int | None = None
    """The step after which it goes on, where an earlier attempt left a checkpoint."""

    @property
    def damaged(self) -> bool:
        """Whether what is there now must be set aside."""
        return any(reason.cause is Cause.DAMAGED for reason in self.reasons)


def plan(
    settings: RunSettings,
    *,
    only: Collection[str] = (),
    until: str | None = None,
    force: Collection[str] = (),
    strict: bool = False,
) -> list[Decision]:
    """Decide for every selected stage, in the order in which they would run.

    Args:
        settings: The run.
        only: Take just these stages; their inputs must be there. Empty takes all.
        until: Take this stage and what it needs.
        force: Run these whether or not anything changed.
        strict: Let changed code and environment count as reasons.

    Raises:
        ConfigError: A name that is no stage, an input that is not selected and was never published, a server's token
            that is not in the environment, or a requirement of what is not measured.
        DataError: A data source is missing, its rows do not fit the stage that will read them, or what an evaluation
            asks is trained on.
        ArtifactError: An input from outside the run is damaged or of the wrong kind.
    """
    names = selection(settings, only, until)
    _known(settings, force)
    verify = cache(manifests.verify)
    decisions: list[Decision] = []
    for name in names:
        running = {decision.stage for decision in decisions if decision.run}
        forced = name in force
        decisions.append(decide(settings, name, running=running, forced=forced, strict=strict, verify=verify))
    due = [decision.stage for decision in decisions if decision.run]
    for name in names:
        stage = settings.stages[name]
        checks.check_requirements(stage, sources(settings, stage), f"stages.{name}")
        if name in due:
            checks.check(settings, name, sources(settings, stage), others_run=name != due[0])
    return decisions


def decide(
    settings: RunSettings,
    name: str,
    *,
    running: Collection[str] = (),
    forced: bool = False,
    strict: bool = False,
    download: bool = False,
    verify: inputs.Verify = manifests.verify,
) -> Decision:
    """Decide for one stage; reads and re-hashes its inputs and outputs.

    Args:
        settings: The run.
        name: The stage.
        running: Stages that will run first, whose contents are therefore not known.
        forced: Run it in any case.
        strict: Let changed code and environment count as reasons.
        download: Fetch hub models that are not in the local cache.
        verify: Re-hashes a stage directory that is an input.
    """
    run = RunDirectory.of(settings)
    stage = settings.stages[name]
    find = partial(inputs.resolve, run=run, stages=settings.stages, download=download, verify=verify)
    wanted = _wanted(settings, stage, running, find)
    old, unfit = _published(run, name)
    hard = [Reason(Cause.FORCED)] if forced else []
    hard += unfit
    soft: list[Reason] = []
    environment = fingerprint.environment() | {"code": fingerprint.sources(stage.kind)}
    if old is not None:
        hard += compare(old, wanted, type(stage))
        soft = list(_soft(old, environment))
    elif not unfit:
        hard.append(Reason(Cause.NEVER_RAN))
    running_now = bool(hard) or (strict and bool(soft))
    maker = Maker(wanted.key, environment)
    after = checkpoints.next_step(run.checkpoints(name), maker) if running_now and not wanted.unknown else None
    return Decision(name, stage.kind, running_now, (*hard, *soft), wanted, maker, after)


def compare(old: Manifest, wanted: Wanted, stage: type[StageSettings]) -> list[Reason]:
    """All hard differences, each with old and new; empty exactly when the hard keys are equal."""
    reasons = [
        Reason(Cause.CONFIG, setting, before, after)
        for setting, before, after in changes(behaviour(old.settings, stage), wanted.behaviour)
    ]
    reasons += wanted.unknown.values()
    before_inputs = {role: each.digest for role, each in old.inputs.items() if role not in wanted.unknown}
    after_inputs = {role: each.digest for role, each in wanted.artifacts.items()}
    reasons += [Reason(Cause.INPUT, *change) for change in changes(before_inputs, after_inputs)]
    before_data, after_data = _without_source(old.data_settings), _without_source(wanted.data)
    for role in before_data.keys() ^ after_data.keys():  # of what is new or gone, the digest says enough
        one_sided = before_data if role in before_data else after_data
        one_sided[role] = {"digest": one_sided[role]["digest"]}
    reasons += [Reason(Cause.DATA, *change) for change in changes(before_data, after_data)]
    if not reasons and wanted.key != old.key:
        reasons.append(Reason(Cause.CONFIG, "key", old.key, wanted.key))
    return reasons


def hard_key(settings: Mapping[str, Any], digests: Mapping[str, str], data: DataSettings) -> str:
    """Digest of what a stage computes from.

    Args:
        settings: What `behaviour` leaves, kind and seed included.
        digests: Input role -> content digest.
        data: Role -> settings and digest; where the source stands does not enter.
    """
    return fingerprint.digest({"settings": settings, "inputs": digests, "data": _without_source(data)})


def behaviour(settings: Mapping[str, Any], stage: type[StageSettings]) -> dict[str, Any]:
    """The settings that results depend on; what inputs and data are called is not among them."""
    without = _WITHOUT_EFFECT | stage.ROLES.keys() | stage.DATA.keys() | {*stage.FILES, *stage.SUITES}
    return {name: value for name, value in settings.items() if name not in without}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Dotted name, old and new value of everything that differs between two nested mappings."""
    before, after = dict(_flat(old)), dict(_flat(new))
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, "absent"), after.get(name, "absent")
        if was != now:
            yield name, was, now


def short(value: str) -> str:
    """Digests by their first characters, other values cut to a line."""
    is_digest = len(value) == 64 and not set(value) - set("0123456789abcdef")
    return value[:8] if is_digest else printable(value)


def sources(settings: RunSettings, stage: StageSettings) -> dict[str, DataSource]:
    """Data role -> source, for all that a stage reads: its data and, as `suites.NAME`, its evaluation suites.

    Raises:
        ConfigError: A suite cannot be read or does not fit the stage.
    """
    found = {role: settings.data[name] for role, name in stage.data_roles().items()}
    return found | loader.suites(stage)


def selection(settings: RunSettings, only: Collection[str], until: str | None) -> list[str]:
    """The stages to look at, inputs first.

    Raises:
        ConfigError: A name that is no stage.
    """
    _known(settings, [*only, *([until] if until else [])])
    names = references.in_order(settings.stages, [until] if until else None)
    return [name for name in names if name in only] if only else names


def _known(settings: RunSettings, names: Collection[str]) -> None:
    for name in names:
        if name not in settings.stages:
            raise ConfigError(f"no stage `{printable(name)}`{suggest(name, settings.stages)}")


def _wanted(
    settings: RunSettings, stage: StageSettings, running: Collection[str], find: Callable[[str], Artifact]
) -> Wanted:
    everything = stage.model_dump(mode="json")
    everything |= {"seed": settings.seed, "device": settings.device, "dtype": settings.dtype}
    artifacts: dict[str, Artifact] = {}
    unknown: dict[str, Reason] = {}
    for role, reference in stage.roles().items():
        if reference in running:
            unknown[role] = Reason(Cause.PARENT, reference)
            continue
        try:
            artifact = find(reference)
        except inputs.NotDownloaded:
            unknown[role] = Reason(Cause.INPUT, role, reference, "not downloaded yet")
            continue
        artifacts[role] = inputs.require(artifact, role, stage.ROLES[role.partition(".")[0]])
    for name in stage.FILES:
        everything |= {f"{name}_sha256": _file_digest(everything[name])}
    data = {role: _data(settings, stage, role, source) for role, source in sources(settings, stage).items()}
    return Wanted(everything, behaviour(everything, type(stage)), data, artifacts, unknown)


def _data(settings: RunSettings, stage: StageSettings, role: str, source: DataSource) -> dict[str, Any]:
    from data import read

    found = source.model_dump(mode="json") | {"digest": read.fingerprint(source, settings.data)}
    shares = stage.shares(role.partition(".")[0]) if role in stage.data_roles() else None
    return found | {"share": shares[role].model_dump(mode="json")} if shares else found


def _file_digest(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return fingerprint.file_sha256(Path(name))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=printable(name, None)) from error


def _published(run: RunDirectory, name: str) -> tuple[Manifest | None, list[Reason]]:
    """The manifest of the published stage, if it can be read, and why it cannot be kept as it is."""
    directory = run.stage(name)
    if not directory.exists():
        return None, []
    try:
        damages = manifests.damages(directory)
        unfit = [Reason(Cause.DAMAGED, each.file, each.expected, each.found) for each in damages]
        return manifests.load(directory), unfit
    except OtherVersionError as error:
        return None, [Reason(Cause.OTHER_VERSION, new=error.what)]
    except ArtifactError as error:
        return None, [Reason(Cause.DAMAGED, manifests.FILE_NAME, "a manifest", error.what)]


def _soft(old: Manifest, now: Mapping[str, Any]) -> Iterator[Reason]:
    before = {name: old.environment.get(name) for name in now}
    for name, was, is_ in changes(before, now):
        cause = Cause.CODE if name == "code" else Cause.ENVIRONMENT
        yield Reason(cause, "" if cause is Cause.CODE else name, was, is_)


def _without_source(data: DataSettings) -> dict[str, dict[str, Any]]:
    """Data settings by what they hold: a file that moved is the same file."""
    return {role: {name: each[name] for name in each if name != "source"} for role, each in data.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else fingerprint.canonical(value)
