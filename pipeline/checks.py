"""What would make a stage fail, found before anything runs: an error after hours of training is a dear one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from pydantic import BaseModel

from pipeline import gate, servers
from pipeline.config import DataSource, EvaluateSettings, RunSettings, StageSettings, trained
from pipeline.errors import ConfigError, DataError
from pipeline.figures import (
    CALIBRATION_ERROR,
    GAIN,
    LENGTH_CONTROLLED,
    LONGER_WINS,
    PERPLEXITY,
    RATIO,
    SCORE,
    SETTINGS,
    SUITE,
    WIN_RATE,
)
from pipeline.rules import WeightedRule
from pipeline.servers import Server
from pipeline.suggestion import suggest
from pipeline.suites import SampledSuite, Suite

_PROMPT = ("prompt",)
_WHOLE_SUITE = PERPLEXITY, CALIBRATION_ERROR, LONGER_WINS
_BOUNDS = {
    "": "hold it against a number, as in `> 0.5`: there is no comparison of it with the parent's",
    GAIN: "hold it against a number, `parent`, `parent + NUMBER` or `parent - NUMBER`: it is compared by difference",
    RATIO: "hold it against a number, `parent` or `NUMBER x parent`: it is compared by ratio",
}
"""How a figure is compared with the parent's -> what to require of it."""


def check(settings: RunSettings, name: str, data: Mapping[str, DataSource], *, others_run: bool) -> None:
    """Look at what a stage will need: tokens of servers, the first rows of its data, and all of its suites.

    Args:
        settings: The run.
        name: A stage that is to run.
        data: Data role -> source, its evaluation suites included.
        others_run: Whether other stages run before it. Only then an evaluation's suites are looked for in the training
            data, which takes as long as reading these: else the stage itself begins with that.

    Raises:
        ConfigError: A server's token is not in the environment, or a suite's responses leave no room for a prompt.
        DataError: A source is missing, rows do not fit the stage or the suite that will read them, none of them is on
            the side that the stage reads, prompts do not hold what a rule needs, or a prompt or text of a test set or
            suite is trained on.
    """
    from data import intake, read

    stage = settings.stages[name]
    _require_tokens(stage, f"stages.{name}")
    for role, source in data.items():
        if isinstance(source, Suite):
            _check_suite(source, stage, f"stages.{name}.{role}")
        else:
            read.check(source, stage.kinds(role))
            if source.scheme != "hub":
                _require_rows(stage, source, f"stages.{name}.{role}")
            if stage.kinds(role) == _PROMPT and source.scheme != "hub":
                _require_facts(stage, source)
    if others_run and isinstance(stage, EvaluateSettings):
        local = {known: source for known, source in settings.data.items() if source.scheme != "hub"}
        learnt = [local[each] for each in trained(settings) if each in local]
        texts = [local[each] for each in trained(settings, text=True) if each in local]
        intake.refuse_trained([each for each in data.values() if each.scheme != "hub"], learnt, texts)


def check_requirements(stage: StageSettings, data: Mapping[str, DataSource], where: str) -> None:
    """Look at what an evaluation requires, which counts for one that is up to date, too.

    Args:
        stage: The stage.
        data: Data role -> source, its evaluation suites included.
        where: The stage's place in the configuration.

    Raises:
        ConfigError: A figure is required that the stage does not measure, or a bound that it cannot be held against.
    """
    if isinstance(stage, EvaluateSettings):
        suites = {f"{SUITE}{role.partition('.')[2]}" for role, source in data.items() if isinstance(source, Suite)}
        _require_figures(stage, suites, f"{where}.require")


def check_device(settings: RunSettings, names: Collection[str]) -> None:
    """See that this machine has the device that is asked for and what stages need on it.

    Torch is asked, which takes seconds to import, only where settings depend on the machine.

    Args:
        settings: The run.
        names: The stages that are to run.

    Raises:
        ConfigError: The device is not there, or an optimizer or a quantization does not work on it.
    """
    optimizers = {name: each for name in names if (each := getattr(settings.stages[name], "optimizer", None))}
    special = {name: each for name, each in optimizers.items() if each.name in ("adamw8bit", "paged_adamw8bit")}
    quantized = {name: getattr(settings.stages[name], "quantization", "none") for name in names}
    quantized = {name: quantization for name, quantization in quantized.items() if quantization != "none"}
    if settings.device in ("auto", "cpu") and not special and not quantized:
        return
    from stages.core import device, models, optim

    available = device.available(settings.device)
    for name in names:
        try:
            if name in special:
                optim.require_support(special[name], available)
            if name in quantized:
                models.require_quantization(quantized[name], available)
        except ConfigError as error:
            raise ConfigError(error.what, where=f"stages.{name}.{error.where}", hint=error.hint) from error


def _require_rows(stage: StageSettings, source: DataSource, where: str) -> None:
    """See that some row is held out, for an evaluation, or is not, for a training; reads up to the first that is.

    A row that cannot be read is left to the stage, which names it.
    """
    from data import read
    from data.findings import Findings
    from data.split import is_held_out

    evaluated = isinstance(stage, EvaluateSettings)
    readings = read.scan(source, Findings())
    if any(not reading.row or is_held_out(reading.row, source.held_out) is evaluated for reading in readings):
        return
    if evaluated:
        raise DataError(f"no held-out rows for {where}", where=source.name, hint="raise its held_out or give more rows")
    raise DataError(f"all rows are held out, none is left for {where}", where=source.name, hint="lower its held_out")


def _require_tokens(settings: BaseModel, where: str) -> None:
    for place, each in _within(settings, where):
        if isinstance(each, Server) and each.token_variable:
            servers.token(each.token_variable, f"{place}.token_variable")


def _require_figures(stage: EvaluateSettings, suites: Collection[str], where: str) -> None:
    """See that every required figure is one that the stage measures; of which tasks and categories, its rows say."""
    whole = _figures(stage) | set(suites)
    compared = {f"{figure}{suffix}" for figure in whole if (suffix := _against_parent(figure))}
    parts = tuple(f"{figure}." for figure in whole if figure in suites or figure == "accuracy")
    whole |= {f"{figure}{ending}" for figure in suites for ending in _WHOLE_SUITE}
    for model, wanted in stage.require.items():
        for figure, text in wanted.items():
            place = f"{where}.{model}.{figure}"
            if figure.startswith(parts):
                continue
            if figure not in whole | compared:
                what = f"the stage measures no such figure{suggest(figure, whole)}"
                hint = "name one that its settings ask for; docs/comparison.md lists them"
                raise ConfigError(what, where=place, hint=hint)
            suffixes = {"", _against_parent(figure)} if figure in whole else {""}
            if suffixes.isdisjoint(gate.parse(text).figures):
                raise ConfigError(f"`{text}` is no bound of this figure", where=place, hint=_BOUNDS[max(suffixes)])


def _against_parent(figure: str) -> str:
    """How a figure is compared with the parent's; empty where it is not, as those that are comparisons themselves."""
    if figure.endswith(_WHOLE_SUITE):
        return ""
    if figure in ("length", "perplexity", "bits_per_byte"):
        return RATIO
    return GAIN if figure in (*SETTINGS, "accuracy") or figure.startswith((SCORE, SUITE)) else ""


def _figures(stage: EvaluateSettings) -> set[str]:
    """What the settings ask for, without suites."""
    scores = {name for name in SETTINGS if getattr(stage, name) not in (None, "none")}
    rules = {name for name, judge in stage.judges.items() if isinstance(judge, list)}
    asked = {
        "accuracy": stage.gold != "none",
        "kl": stage.is_plain,
        "frontier_gap": stage.best_of is not None,
        "pair_accuracy": stage.pairs is not None,
        "perplexity": stage.text is not None,
        "bits_per_byte": stage.text is not None,
    }
    return {
        "length",
        *(figure for figure, measured in asked.items() if measured),
        *scores,
        *(f"{SCORE}{name}" for name in rules),
        *(f"{kind}{name}" for name in (*scores, *stage.judges) for kind in (WIN_RATE, LENGTH_CONTROLLED)),
    }


def _within(settings: Any, where: str) -> Iterator[tuple[str, BaseModel]]:
    """All parts of settings, themselves included, each with its place."""
    if isinstance(settings, BaseModel):
        yield where, settings
        inner: Iterable[tuple[Any, Any]] = ((name, getattr(settings, name)) for name in type(settings).model_fields)
    elif isinstance(settings, dict):
        inner = settings.items()
    elif isinstance(settings, list):
        inner = enumerate(settings)
    else:
        return
    for name, each in inner:
        yield from _within(each, f"{where}.{name}")


def _require_facts(stage: StageSettings, source: DataSource) -> None:
    """See that the first prompts that are judged by a rule that knows what is correct hold what it needs."""
    from data import read
    from data.naming import require_plain
    from data.split import is_held_out
    from reward.rules import require_facts

    gold, rules = _gold(stage), _knowing(stage)
    if not (gold or rules):
        return
    evaluated = isinstance(stage, EvaluateSettings)
    looks = min(read.CHECKED_ROWS, getattr(stage, "rows", read.CHECKED_ROWS)) if evaluated else read.CHECKED_ROWS
    judged = (
        (row, gold | rules if held_out else rules)
        for row in read.prompts(source)
        if (held_out := is_held_out(row, source.held_out)) or (rules and not evaluated)
    )
    for row, needed in islice(judged, looks):
        require_facts(needed, row)
        if evaluated:
            require_plain(str(row.facts.get("task", "")), "task", row.origin)


def _gold(settings: BaseModel) -> set[str]:
    return {getattr(settings, "gold", "none")} - {"none"}


def _knowing(settings: BaseModel) -> set[str]:
    """The rules in settings that read what a prompt's facts say is correct."""
    from reward.rules import JUDGES

    rules = (each for _, each in _within(settings, "") if isinstance(each, WeightedRule))
    return {rule for each in rules if (rule := getattr(each, "rule", "")) in JUDGES}


def _check_suite(suite: Suite, stage: StageSettings, where: str) -> None:
    """Read all rows of a suite: there are few, and each of them may be at fault."""
    from data import read, suite_rows
    from reward.rules import require_facts

    _require_tokens(suite, where)
    if isinstance(stage, EvaluateSettings) and isinstance(suite, SampledSuite):
        _require_room(suite, stage, where)
    if suite.scheme == "hub":
        read.check(suite, suite.KINDS)
        return
    rules = _gold(suite) | _knowing(suite)
    for item in suite_rows.read(suite).chosen:
        row: Any = item.row  # a prompt, where there are rules
        require_facts(rules, row)


def _require_room(suite: SampledSuite, stage: EvaluateSettings, where: str) -> None:
    if suite.max_new_tokens >= stage.max_length:
        what = f"max_new_tokens={suite.max_new_tokens} of the suite leaves no room for a prompt in the stage's "
        hint = "raise `max_length` of the stage, or lower `max_new_tokens` in a copy of the suite"
        raise ConfigError(f"{what}max_length={stage.max_length}", where=where, hint=hint)
