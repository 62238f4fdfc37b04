"""The configuration object of a trainer: a stage's settings by TRL's names, and the user's own arguments."""

from __future__ import annotations

import dataclasses
import importlib
import os
import traceback
import typing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from pydantic import TypeAdapter, ValidationError

from pipeline.config import TrlSettings
from pipeline.contract import Context
from pipeline.errors import ConfigError
from pipeline.suggestion import suggest
from pipeline.terminal import printable
from pipeline.trainers import Trainer, reserved
from stages.core.device import Compute

EXPECTED: dict[str, type[Warning]] = {
    "You are importing from 'trl.experimental'": UserWarning,
    # TRL 1.16 and peft 0.21 use the names that transformers had before 5.23.
    "`(is_)?gradient_checkpointing": FutureWarning,
}
"""Beginning of a warning's message -> its kind."""
BY_EPOCH = {("OnlineDPO", "beta")}
"""Arguments of trainers that may be a list, of which TRL takes one in each epoch."""
REFUSING = ("trl", "transformers")
"""Packages that say what is wrong with arguments."""


@dataclasses.dataclass(frozen=True)
class Classes:
    """What TRL calls a trainer and its configuration."""

    trainer: Any
    config: Any

    def types(self) -> dict[str, Any]:
        """Name -> type of what the configuration takes."""
        found = typing.get_type_hints(self.config)
        return {field.name: found[field.name] for field in dataclasses.fields(self.config) if field.init}

    def default(self, name: str) -> Any:
        """What the configuration takes for granted."""
        return next(field.default for field in dataclasses.fields(self.config) if field.name == name)


def classes(name: str, trainer: Trainer) -> Classes:
    """Import a trainer, which takes seconds."""
    _send_nothing()
    with expected_warnings():
        module = importlib.import_module(trainer.module)
    return Classes(getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config"))


def check(context: Context, found: Classes) -> None:
    """See that the configuration knows every argument of the user's and takes its value.

    Raises:
        ConfigError: It does not.
    """
    types = found.types()
    for name, value in context.settings.arguments.items():
        where = f"stages.{context.name}.arguments.{printable(name)}"
        if name not in types:
            free = [each for each in types if not reserved(each)]
            raise ConfigError(f"{found.config.__name__} has no such argument{suggest(name, free)}", where=where)
        if not any(_fits(each, types[name]) for each in (value, [value])):  # lists may be given as their only item
            what = f"{printable(repr(value))} is not {_readable(types[name])}"
            raise ConfigError(what, where=where, hint="see TRL's documentation of the argument")
        if (context.settings.trainer, name) in BY_EPOCH and isinstance(value, list) and len(value) > 1:
            raise ConfigError("one for each epoch: a stage counts steps", where=where, hint="give one number")


def build(context: Context, found: Classes, compute: Compute, steps: int, directory: Path) -> Any:
    """The configuration object.

    Args:
        context: The stage's.
        found: The trainer's classes.
        compute: Device and precision.
        steps: Optimizer steps.
        directory: Where the trainer may write.

    Raises:
        ConfigError: TRL refuses the arguments.
    """
    types = found.types()
    decided = {
        **_amounts(context, found, steps),
        **_habits(context, compute),
        "output_dir": str(directory),
    }
    with refusals(context), expected_warnings():
        made = found.config(
            **{name: value for name, value in decided.items() if name in types}, **context.settings.arguments
        )
        # A trainer would spread its batches over all GPUs, as many times larger. Asking counts them, once.
        made._n_gpu = min(made.n_gpu, 1)
    return made


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Leave out what TRL and the libraries beneath it say to their developers; their versions are pinned."""
    with warnings.catch_warnings():
        for message, kind in EXPECTED.items():
            warnings.filterwarnings("ignore", message, kind)
        yield


@contextmanager
def refusals(context: Context) -> Iterator[None]:
    """What TRL and `transformers` raise against a combination of arguments, as an error of the configuration."""
    try:
        yield
    except (ValueError, ImportError, NotImplementedError) as error:
        if _raised_in(error) not in REFUSING:
            raise
        raise ConfigError(
            f"{context.settings.trainer} refuses its settings: {printable(' '.join(str(error).split()), 400)}",
            where=f"stages.{context.name}",
            hint="change `arguments`, or the setting that the message names",
        ) from error


def _raised_in(error: BaseException) -> str:
    """The package whose code raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).partition(".")[0]


def _send_nothing() -> None:
    """Trainers report their use to the Hub; the variable is for processes that they start, as this one has read it."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    constants.HF_HUB_DISABLE_TELEMETRY = True


def _amounts(context: Context, found: Classes, steps: int) -> dict[str, Any]:
    """How much is computed at once and in all, and how far a step may go."""
    settings: TrlSettings = context.settings
    group = 1
    if settings.method.grouped:
        group = settings.arguments.get("num_generations", found.default("num_generations"))
    return {
        "per_device_train_batch_size": settings.examples_per_batch * group,
        "gradient_accumulation_steps": settings.examples_per_step // settings.examples_per_batch,
        "max_steps": steps,
        "max_grad_norm": settings.optimizer.clip_norm,
        "max_length": settings.max_length,
        "max_prompt_length": settings.max_length - (settings.max_new_tokens or 0),
        "max_completion_length": settings.max_new_tokens,
        "max_new_tokens": settings.max_new_tokens,
    }


def _habits(context: Context, compute: Compute) -> dict[str, Any]:
    """What holds for every trainer: nothing is stored or sent, every step is logged, and the order is ours."""
    return {
        "seed": context.seed,
        "gradient_checkpointing": context.settings.gradient_checkpointing,
        "use_cpu": compute.device.type == "cpu",
        "bf16": compute.dtype == torch.bfloat16,
        "dataloader_pin_memory": compute.device.type == "cuda",
        "train_sampling_strategy": "sequential",
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        # Else a loss that is not a number is logged as the mean of those before it.
        "logging_nan_inf_filter": False,
    }


def _fits(value: Any, kind: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _readable(kind: Any) -> str:
    return f"a {kind.__name__}" if isinstance(kind, type) else str(kind).replace("typing.", "").replace(" | ", " or ")
