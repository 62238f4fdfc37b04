"""lm-eval-harness on a live model: a base with its adapter in use, as the other stages compute it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from pipeline.contract import Artifact
from pipeline.errors import ConfigError
from pipeline.suggestion import suggest
from pipeline.terminal import printable
from stages.core import device
from stages.core.lineup import Lineup
from stages.core.models import LanguageModel

KEPT = ("doc_id", "target", "resps", "filter")
"""What is kept of each sample, besides its figures."""


def run(artifact: Artifact, tasks: Sequence[str], include: Path, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Evaluate a model or an adapter on tasks of a folder.

    Args:
        artifact: Verified; it is computed on the device and in the precision that its own stage asked for.
        tasks: Names of tasks.
        include: Folder of the task files; no others are looked at.
        limit: Rows of each task, the first ones.
        batch_size: Rows that go through the model at once.

    Returns:
        Task -> `figures` by `metric,filter`, `rows`, `version` and `samples`, as JSON.

    Raises:
        ArtifactError: The model is damaged or not what its manifest says.
        ConfigError: There is no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(include), include_defaults=False)
    known = list(manager.all_tasks)
    for task in tasks:
        if task not in known:
            hint = f"tasks of this folder: {', '.join(map(printable, known)) or 'none'}"
            raise ConfigError(f"no task `{printable(task)}`{suggest(task, known)}", where=include, hint=hint)
    settings = artifact.manifest.settings if artifact.manifest else {}
    compute = device.choose(settings.get("device", "auto"), settings.get("dtype", "auto"))
    (contestant,) = Lineup({"models.0": artifact}, compute).contestants.values()
    with contestant.use() as language_model, compute.autocast():
        found: Any = simple_evaluate(
            model=_as_theirs(language_model, batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=True,
            log_samples=True,
            bootstrap_iters=1000,
        )
    return {task: _of_task(task, found) for task in found["results"]}


def _as_theirs(language_model: LanguageModel, batch_size: int) -> Any:
    """The model as lm-eval takes it, which reads prompts, ends responses and writes their text as Baton's evaluation
    does: nothing is added to what the chat template says, and a model's own generation settings have no say."""
    from lm_eval.models import huggingface

    library: Any = huggingface  # checked the same with and without it
    model, tokenizer, template = language_model.model, language_model.tokenizer, language_model.template
    model.generation_config = GenerationConfig(eos_token_id=template.stop_id, pad_token_id=tokenizer.pad_token_id)

    class Theirs(library.HFLM):
        @property
        def eot_token_id(self) -> int:
            return template.stop_id

        def tok_decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
            if not skip_special_tokens:
                return str(super().tok_decode(tokens, skip_special_tokens=False))
            return template.decode(tokens)

    return Theirs(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)


def _of_task(task: str, found: Any) -> dict[str, Any]:
    results = found["results"][task]
    figures = {name: value for name, value in results.items() if "," in name and isinstance(value, int | float)}
    samples = found["samples"].get(task, [])
    metrics = {name.partition(",")[0] for name in figures}
    return {
        "figures": figures,
        "rows": found["n-samples"].get(task, {}).get("effective", len(samples)),
        "version": found["versions"].get(task),
        "samples": [{name: each[name] for name in (*KEPT, *sorted(metrics & each.keys()))} for each in samples],
    }
