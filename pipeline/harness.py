"""lm-eval-harness on stages of a run: local task files, results kept beside the stages.

RUN/evals/STAGE-DIGEST/TASK.json    figures and samples, with the digests of the stage and of its chat template
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import durable, inputs, store
from pipeline.contract import Artifact
from pipeline.errors import ConfigError
from pipeline.store import RunDirectory

EVALUATED = ("model", "adapter")


@dataclass(frozen=True)
class Evaluation:
    """A task's results and the file that holds them."""

    path: Path
    content: dict[str, Any]


def evaluate(stage: Path, tasks: Sequence[str], include: Path, limit: int | None, batch_size: int) -> list[Evaluation]:
    """Evaluate a stage on tasks and keep the results; an earlier result of the same stage and task is replaced.

    Args:
        stage: Directory of a stage that made a model or an adapter.
        tasks: Names of tasks in the folder.
        include: Folder of task files, which may name Python functions: they are run.
        limit: Rows of each task, the first ones; all when None.
        batch_size: Rows that go through the model at once.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task or folder, or this is not a stage.
        ArtifactError: The stage is damaged.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval-harness is not installed", hint='pip install "baton-align[eval]"')
    if not include.is_dir():
        raise ConfigError("no such folder", where=include, hint="give the folder with the task files")
    artifact = inputs.resolve(str(stage.resolve()), RunDirectory(stage), ())
    if artifact.manifest is None:
        raise ConfigError("not a stage: it has no manifest", where=stage, hint="give the directory of a stage")
    inputs.require(artifact, "eval", EVALUATED)
    from stages.core import harness

    found = harness.run(artifact, tasks, include, limit, batch_size)
    folder = artifact.directory.parent.parent / "evals" / f"{artifact.directory.name}-{artifact.digest[:8]}"
    with store.storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return [_keep(folder / f"{task}.json", _record(artifact, task, limit, own)) for task, own in found.items()]


def _record(artifact: Artifact, task: str, limit: int | None, found: dict[str, Any]) -> dict[str, Any]:
    assert artifact.manifest is not None
    return {
        "task": task,
        "stage": artifact.manifest.stage,
        "digest": artifact.digest,
        "chat_template": artifact.manifest.tokenizer.get("chat_template"),
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": limit,
        **found,
    }


def _keep(path: Path, content: dict[str, Any]) -> Evaluation:
    durable.write_text(path, json.dumps(content, indent=1) + "\n")
    return Evaluation(path, content)
