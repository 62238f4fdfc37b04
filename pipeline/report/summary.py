"""The report as data: what `report.json` holds and the page is drawn from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from pydantic import TypeAdapter

import pipeline
from pipeline import document
from pipeline.errors import ConfigError
from pipeline.gate import Check, check
from pipeline.manifest import Metric
from pipeline.report.health import trends
from pipeline.report.inputs import ModelEvaluation, RunRecord, StageRecord
from pipeline.report.verdict import Verdict, judge, over_optimised

_REQUIRED = TypeAdapter(dict[str, dict[str, str]])


def summarise(run: RunRecord) -> dict[str, Any]:
    """JSON values only, with nothing that depends on when or where the report is made."""
    models = evaluated(run)
    return {
        "run": run.name,
        "created_by": f"baton {pipeline.__version__}",
        "command": command(run),
        "stages": {name: _stage(name, run, models.get(name)) for name in run.stages},
        "verdict": _verdict(run, models).as_json(),
        "requirements": {name: [each.as_json() for each in checks] for name, checks in _checks(run)},
    }


def _verdict(run: RunRecord, models: Mapping[str, ModelEvaluation]) -> Verdict:
    """What the evaluations say, with a caution where they are of other models than the run's."""
    found = judge(models)
    # That one is best, or none better than the start, is said of all of them.
    replaced = [name for name in models if _is_replaced(name, models, run)]
    if not replaced:
        return found
    caution = f"The evaluation is of an earlier {' and '.join(replaced)} than the run's: evaluate again."
    return replace(found, caution=f"{caution} {found.caution}".rstrip())


def _is_replaced(name: str, models: Mapping[str, ModelEvaluation], run: RunRecord) -> bool:
    """Whether a stage was made anew since the evaluation whose figures are shown."""
    return any(
        each.source == name and each.digest != run.stages[name].manifest.digest
        for record in run.stages.values()
        if record.evaluation and name in run.stages and record.evaluation.models.get(name) is models[name]
        for each in record.manifest.inputs.values()
    )


def evaluated(run: RunRecord) -> dict[str, ModelEvaluation]:
    """Every evaluated model, as one evaluation found it: of several, one in which its parent was evaluated too, then
    that of the most models, then the latest in the run's order."""
    latest = [record.evaluation for record in reversed([*run.stages.values()]) if record.evaluation]
    largest = sorted(latest, key=lambda each: len(each.models), reverse=True)
    names = dict.fromkeys(name for each in largest for name in each.models)
    return {name: _against_its_parent([each.models[name] for each in largest if name in each.models]) for name in names}


def elsewhere(run: RunRecord) -> dict[str, list[str]]:
    """Evaluation -> its models of which `evaluated` takes another one's figures."""
    shown = evaluated(run)
    found = {
        name: [model for model, each in record.evaluation.models.items() if each is not shown[model]]
        for name, record in run.stages.items()
        if record.evaluation
    }
    return {name: models for name, models in found.items() if models}


def _against_its_parent(found: list[ModelEvaluation]) -> ModelEvaluation:
    """The first that has a parent, or else the first."""
    return next((each for each in found if each.parent is not None), found[0])


def command(run: RunRecord) -> str:
    """The command that makes the run again, from the configuration that is kept in it."""
    return f"baton run {shlex.quote(str(PurePath(_output(run)) / 'config.yaml'))}"


def _output(run: RunRecord) -> str:
    output = _config(run).get("output")
    return output if isinstance(output, str) else run.name


def _config(run: RunRecord) -> dict[str, Any]:
    """The configuration's values; none where it cannot be read."""
    try:
        config = document.parse(run.config, "config.yaml").values
    except ConfigError:
        return {}
    return config if isinstance(config, dict) else {}


def _checks(run: RunRecord) -> Iterator[tuple[str, list[Check]]]:
    """Evaluation -> what the configuration requires of it now, which may have changed since it was made."""
    stages = _config(run).get("stages")
    for name, record in run.stages.items():
        stage = stages.get(name) if isinstance(stages, dict) else None
        try:
            required = _REQUIRED.validate_python(stage.get("require", {}) if isinstance(stage, dict) else {})
            checks = check(required, record.manifest.metrics)
        except ValueError:  # a configuration that somebody wrote there
            continue
        if checks:
            yield name, checks


def _stage(name: str, run: RunRecord, model: ModelEvaluation | None) -> dict[str, Any]:
    record = run.stages[name]
    manifest = record.manifest
    measured = {**manifest.metrics, **(model.metrics if model else {})}
    return {
        "kind": manifest.kind,
        "stage_kind": manifest.stage_kind,
        "digest": manifest.digest,
        "manifest_sha256": record.manifest_sha256,
        "key": manifest.key,
        "parents": {role: each.source for role, each in manifest.inputs.items()},
        "metrics": _metrics(measured),
        "frontier": _frontiers(record),
        "suites": _suites(record),
        "looks": [look.model_dump() for look in record.looks],
        "health": {each.diagnostic.name: each.as_json() for each in trends(record.steps)},
        "cost": manifest.cost.model_dump(),
        "data": [card.model_dump() for card in manifest.data],
        "warnings": [*manifest.warnings, *_found_here(record, run, model)],
    }


def _metrics(measured: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: metric.model_dump() for name, metric in measured.items()}


def _frontiers(record: StageRecord) -> dict[str, Any]:
    """Of an evaluation: best-of-n's by the model that the responses are of."""
    found = record.evaluation.frontier if record.evaluation else {}
    return {name: [point.model_dump() for point in points] for name, points in found.items()}


def _suites(record: StageRecord) -> dict[str, Any]:
    """Of an evaluation: what its suites measure; their figures are among the models' metrics."""
    found = record.evaluation.suites if record.evaluation else {}
    return {name: suite.model_dump() for name, suite in found.items()}


def _found_here(record: StageRecord, run: RunRecord, model: ModelEvaluation | None) -> list[str]:
    """Warnings that no stage can give about itself."""
    found = [
        f"made from another {each.source} ({role}) than the one in this run: {each.digest} is now "
        f"{run.stages[each.source].manifest.digest}"
        for role, each in sorted(record.manifest.inputs.items())
        if each.source in run.stages and run.stages[each.source].manifest.digest != each.digest
    ]
    warning = over_optimised(model) if model else None
    return [*found, warning] if warning else found
