"""The peer's side of the PPO comparison: PPOTrainer of TRL 1.12, the last release that has one.

`python -m bench.ppo_peer JOB`, with that release before the installed one on PYTHONPATH. A job's `variant` says what is
trained, and which precision frozen weights are held in:

lora-bfloat16, lora-float32   an adapter of the policy, whose reference is the base with the adapter off, and all of the
                              value model: the trainer puts an adapter on nothing but the policy
full-float32                  all of the policy, whose reference is a copy, and all of the value model

What is trained whole is held in float32. The trainer is not changed: it is given another loader, since its own
shuffles, and calls of three functions are followed. It is kept away from an attention whose gradients are NaN, as
Baton's stages are.
"""

from __future__ import annotations

import os
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback

from bench import processes
from bench.job import Job
from bench.ppo_given import Drawn, classifier, micro_batch, settings
from bench.watch import Phases, Watch, live_parameters
from data.template import ChatTemplate
from data.tokenizer import load_tokenizer
from pipeline.config import PpoSettings
from reward.shaping import explained_variance
from stages.core.device import avoid_broken_attention


class Follower(TrainerCallback):
    """Follows the trainer from iteration to iteration."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self._watch = watch
        self.phases = Phases(job)
        self.drawn = Drawn(job)
        self.last: dict[str, float] = {}
        self._values: list[Tensor] = []

    def follow(self, functions: Any, value_model: Any, response_length: int, pad_id: int) -> None:
        """Wrap the functions of the trainer's module that tell where its phases end, and how good the values are."""
        generate, score, whiten = functions.batch_generation, functions.get_reward, functions.masked_whiten

        @wraps(generate)
        def full_length(model: Any, queries: Tensor, *rest: Any) -> Any:
            self.drawn.require_next([[token for token in row if token != pad_id] for row in queries.tolist()])
            sequences, logits = generate(model, queries, *rest)
            if sequences.shape[1] - queries.shape[1] != response_length:
                raise ValueError("a response ended before its full length")
            self._values.clear()
            return sequences, logits

        @wraps(score)
        def scored(model: Any, sequences: Tensor, pad: int, context: int) -> Any:
            found = score(model, sequences, pad, context)
            if model is value_model:
                self._values.append(found[0][:, context - 1 : -1].squeeze(-1))
            return found

        @wraps(whiten)
        def whitened(advantages: Tensor, mask: Tensor, **options: Any) -> Tensor:
            self.phases.mark("scoring")
            values = torch.cat(self._values)
            self.last["explained_variance"] = explained_variance(values, advantages + values, mask)
            return whiten(advantages, mask, **options)

        functions.batch_generation = self.phases.marking("rollout", full_length)
        functions.get_reward, functions.masked_whiten = scored, whitened

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """The figures of an iteration."""
        self.last |= {"reward": logs["objective/scores"], "kl": logs["objective/kl"]}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An iteration has ended."""
        self._watch.step()
        self.phases.end("training")


def train(job: Job, watch: Watch) -> dict[str, Any]:
    """Take all iterations; returns what was noted."""
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

    chosen = settings(job)
    what, _, weights = job.variant.partition("-")
    dtype, tokenizer = getattr(torch, weights), load_tokenizer(job.base)
    tokenizer.pad_token_id = ChatTemplate(tokenizer).padding_id  # one that ends a turn would be masked within prompts
    tokenizer.padding_side = "left"
    follower = Follower(job, watch)
    trainer = PPOTrainer(
        args=arguments(job, chosen),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype),
        ref_model=None,
        reward_model=classifier(job, dtype),
        value_model=classifier(job, torch.float32),
        train_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in follower.drawn.prompts]),
        peft_config=adapter(job) if what == "lora" else None,
    )
    trainer.dataloader = _in_order(trainer, job.examples_per_step)
    follower.follow(ppo_trainer, trainer.value_model, chosen.max_new_tokens, tokenizer.pad_token_id)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(follower)
    trainer.train()
    return {"phases": follower.phases.steps, "last": follower.last, **live_parameters()}


def arguments(job: Job, chosen: PpoSettings) -> Any:
    """The trainer's arguments: what Baton's stage is given."""
    from trl.experimental.ppo import PPOConfig

    micro = micro_batch(chosen, job.examples_per_step)
    return PPOConfig(
        **shared_arguments(job, chosen),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=job.examples_per_step // micro,
        total_episodes=job.steps * job.examples_per_step,
        num_ppo_epochs=chosen.update_epochs,
        num_mini_batches=chosen.minibatches,
        response_length=chosen.max_new_tokens,
        stop_token=None,
        temperature=chosen.temperature,
        kl_coef=chosen.kl_coefficient,
        gamma=chosen.discount,
        lam=chosen.gae_lambda,
        cliprange=chosen.clip,
        cliprange_value=chosen.value_clip,
        num_sample_generations=0,
    )


def shared_arguments(job: Job, chosen: PpoSettings) -> dict[str, Any]:
    """The arguments that all of TRL's trainers have: nothing is stored or told in between."""
    optimizer = chosen.optimizer
    return {
        "output_dir": str(job.directory / "peer"),
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "max_grad_norm": optimizer.clip_norm,
        "seed": job.seed,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def adapter(job: Job) -> LoraConfig:
    """Such an adapter as Baton's policy has, on the same of the base's layers."""
    own, config = settings(job).lora, AutoConfig.from_pretrained(job.base)
    top = own.top_layers
    layers = range(config.num_hidden_layers - top, config.num_hidden_layers) if top else None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=own.rank,
        lora_alpha=own.alpha,
        lora_dropout=0.0,
        target_modules=_linear(config) if layers else "all-linear",
        layers_to_transform=list(layers) if layers else None,
    )


def _linear(config: Any) -> list[str]:
    """What the linear layers of a decoder's layer are called: peft wants single layers chosen with names."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    found = {name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    return sorted(found - {"lm_head"})


def main() -> None:
    """Run one job; a variant that does not run here says why."""
    job = Job.read(Path(sys.argv[1]))
    disable_progress_bars()
    avoid_broken_attention()
    if job.dtype == "bfloat16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # the trainer does not pass its own `bf16` on
    watch = Watch(job)
    try:
        found = train(job, watch)
    except Exception as error:  # whatever it is, it is the answer to whether this variant runs
        processes.report(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    watch.report([], **found)


def _in_order(trainer: Any, size: int) -> Any:
    loader = DataLoader(trainer.train_dataset, batch_size=size, collate_fn=trainer.data_collator)
    return trainer.accelerator.prepare(loader)


if __name__ == "__main__":
    main()
