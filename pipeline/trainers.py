"""The trainers of TRL 1.16 that a `trl` stage can drive, and the arguments of theirs that are not the user's.

The table stands here so that a configuration can be checked without importing TRL, which takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Layout = Literal["conversation", "pair", "triple", "verdict", "prompt"]
"""What a trainer goes over: conversations; pairs of responses; a best, a second and a worst response; single responses
with a verdict; or prompts that it answers itself."""

KINDS: dict[Layout, tuple[str, ...]] = {
    "conversation": ("conversation",),
    "pair": ("preference",),
    "triple": ("preference",),
    "verdict": ("rated", "preference"),
    "prompt": ("prompt",),
}
"""Layout -> kinds of rows that can be laid out so, in order of preference."""


@dataclass(frozen=True)
class Trainer:
    """A trainer of TRL: `NAMETrainer` with its `NAMEConfig` in `module`."""

    module: str
    layout: Layout
    compares: bool = False
    """Whether it holds the policy to a reference, which is the policy's own start."""
    grouped: bool = False
    """Whether its batches are counted in responses, `num_generations` to a prompt."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of rows that it takes, in order of preference."""
        return KINDS[self.layout]

    @property
    def samples(self) -> bool:
        """Whether it learns from its own responses, which need a reward."""
        return self.layout == "prompt"


TRAINERS: dict[str, Trainer] = {
    "A2PO": Trainer("trl.experimental.a2po", "prompt", compares=True),
    "CPO": Trainer("trl.experimental.cpo", "pair"),
    "DPO": Trainer("trl", "pair", compares=True),
    "GMPO": Trainer("trl.experimental.gmpo", "prompt", compares=True, grouped=True),
    "GRPO": Trainer("trl", "prompt", compares=True, grouped=True),
    "KTO": Trainer("trl", "verdict", compares=True),
    "OnlineDPO": Trainer("trl.experimental.online_dpo", "prompt", compares=True),
    "ORPO": Trainer("trl.experimental.orpo", "pair"),
    "Reward": Trainer("trl", "pair"),
    "RLOO": Trainer("trl", "prompt", compares=True, grouped=True),
    "SFT": Trainer("trl", "conversation"),
    "TPO": Trainer("trl.experimental.tpo", "triple"),
}
"""By the name that the configuration uses."""

_TEACHER = "needs a second model, the teacher"
_SERVER = "needs a server that generates"
_REPROMPTS = "puts words around the data outside the chat template"
ABSENT: dict[str, str] = {
    "AsyncDistillation": _SERVER,
    "AsyncGRPO": _SERVER,
    "Distillation": _TEACHER,
    "GKD": _TEACHER,
    "GOLD": _TEACHER,
    "IWOPD": _TEACHER,
    "SDFT": _REPROMPTS,
    "SDPO": _REPROMPTS,
    "ServerDistillation": _SERVER,
}
"""Trainers of TRL that are not in the table -> why."""

_RESERVED: dict[str, tuple[str, ...]] = {
    "set `examples_per_batch`": ("per_device_train_batch_size", "auto_find_batch_size"),
    "set `examples_per_step`": ("gradient_accumulation_steps", "generation_batch_size"),
    "set `epochs`": ("num_train_epochs",),
    "set `steps`": ("max_steps",),
    "set `max_length`": ("max_length", "max_prompt_length", "truncation_mode"),
    "set `max_new_tokens`": ("max_completion_length", "max_new_tokens"),
    "set `optimizer`": (
        "learning_rate",
        "weight_decay",
        "adam_beta?",
        "adam_epsilon",
        "optim",
        "optim_*",
        "warmup_steps",
        "lr_scheduler_*",
        "max_grad_norm",
    ),
    "set `gradient_checkpointing`": ("gradient_checkpointing", "activation_checkpointing"),
    "set the run's `seed`": ("seed", "data_seed"),
    "set the run's `device`": ("use_cpu", "dataloader_pin_memory"),
    "set the run's `dtype`": ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"),
    "examples are taken in the order of the run's seed": (
        "train_sampling_strategy",
        "shuffle_dataset",
        "length_column_name",
        "dataloader_drop_last",
        "ignore_data_skip",
    ),
    "one row of a batch is one example": ("packing", "packing_strategy", "padding_free"),
    "the stage makes the tokens": (
        "chat_template_*",
        "eos_token",
        "pad_token",
        "padding_value",
        "dataset_text_field",
        "dataset_kwargs",
        "assistant_only_loss",
        "completion_only_loss",
        "remove_unused_columns",
        "is_encoder_decoder",
    ),
    "the stage loads `policy` and `reward`": ("model_init_kwargs", "trust_remote_code", "reward_model_path"),
    "the stage stores its result": (
        "output_dir",
        "save_*",
        "resume_from_checkpoint",
        "restore_callback_states_from_checkpoint",
        "load_best_model_at_end",
        "enable_jit_checkpoint",
        "push_to_hub",
        "hub_*",
    ),
    "the stage logs every step": (
        "report_to",
        "log_*",
        "logging_*",
        "run_name",
        "project",
        "trackio_*",
        "disable_tqdm",
        "num_completions_to_print",
        "include_num_input_tokens_seen",
        "skip_memory_metrics",
    ),
    "held-out rows are for the stage and for evaluate stages": (
        "do_*",
        "eval_*",
        "per_device_eval_batch_size",
        "num_generations_eval",
        "metric_for_best_model",
        "greater_is_better",
        "include_for_metrics",
        "batch_eval_metrics",
        "prediction_loss_only",
        "label_names",
        "generate_during_eval",
    ),
    "a stage runs in one process": (
        "ddp_*",
        "ds3_*",
        "fsdp*",
        "deepspeed",
        "local_rank",
        "parallelism_config",
        "accelerator_config",
        "average_tokens_across_devices",
        "dataset_num_proc",
    ),
    "responses are generated by transformers": (
        "use_vllm",
        "vllm_*",
        "use_transformers_*",
        "transformers_continuous_batching_config",
    ),
}
"""Reason -> patterns of the names of arguments that a stage decides."""


def reserved(argument: str) -> str | None:
    """Why an argument of a trainer's configuration is not the user's to set; None if it is."""
    for reason, patterns in _RESERVED.items():
        if any(fnmatchcase(argument, pattern) for pattern in patterns):
            return reason
    return None
