"""The peer without a value function: RLOOTrainer of the installed TRL, beside Baton's `advantage: rloo`.

`python -m bench.rloo_peer JOB`; the job's `variant` is the precision that the frozen base is held in, `bfloat16` or
`float32`. The trainer is given prompts in token text (`stages/core/trl/text.py`), and a reward function that reads the
tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from bench import processes
from bench.job import Job
from bench.ppo_given import Drawn, classifier, micro_batch, settings
from bench.ppo_peer import adapter, shared_arguments
from bench.watch import Phases, Watch, live_parameters
from data.template import ChatTemplate
from data.tokenizer import load_tokenizer
from pipeline.config import PpoSettings
from stages.core.device import avoid_broken_attention
from stages.core.trl.text import as_text, as_tokens, text_tokenizer


class Follower(TrainerCallback):
    """Follows the trainer; an iteration has as many steps as epochs."""

    def __init__(self, job: Job, watch: Watch, chosen: PpoSettings) -> None:
        self._watch = watch
        self._epochs, self._length = chosen.update_epochs, chosen.max_new_tokens
        self._steps = 0
        self.phases = Phases(job)
        self.last: dict[str, float] = {}

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """The figures of a step; its KL is that of a mean token."""
        if "reward" in logs:
            self.last = {"reward": float(logs["reward"]), "kl": float(logs["kl"]) * self._length}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has moved."""
        self._steps += 1
        if self._steps % self._epochs == 0:
            self._watch.step()
            self.phases.end("training")


def train(job: Job, watch: Watch) -> dict[str, Any]:
    """Take all iterations; returns what was noted."""
    chosen, drawn = settings(job), Drawn(job)
    dtype, tokenizer = getattr(torch, job.variant), _tokenizer(job)
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)
    model.generation_config.eos_token_id = None
    follower = Follower(job, watch, chosen)
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=_reward(job, drawn, tokenizer.pad_token_id, chosen.max_new_tokens),
        args=arguments(job, chosen),
        train_dataset=Dataset.from_list([{"prompt": as_text(prompt)} for prompt in drawn.prompts]),
        processing_class=tokenizer,
        peft_config=adapter(job),
    )
    _follow(trainer, follower.phases)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(follower)
    trainer.train()
    return {"phases": follower.phases.steps, "last": follower.last, **live_parameters()}


def arguments(job: Job, chosen: PpoSettings) -> RLOOConfig:
    """The trainer's arguments: what Baton's stage is given."""
    responses = job.examples_per_step * chosen.samples_per_prompt
    micro = micro_batch(chosen, responses)
    return RLOOConfig(
        **shared_arguments(job, chosen),
        max_steps=job.steps * chosen.update_epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=responses // micro,
        num_iterations=chosen.update_epochs,
        num_generations=chosen.samples_per_prompt,
        max_completion_length=chosen.max_new_tokens,
        temperature=chosen.temperature,
        beta=chosen.kl_coefficient,
        epsilon=chosen.clip,
        shuffle_dataset=False,
        logging_steps=1,
    )


def main() -> None:
    """Run one job; a variant that does not run here says why."""
    job = Job.read(Path(sys.argv[1]))
    disable_progress_bars()
    avoid_broken_attention()
    watch = Watch(job)
    try:
        found = train(job, watch)
    except Exception as error:  # whatever it is, it is the answer to whether this variant runs
        processes.report(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    watch.report([], **found)


def _tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """Of token text; its end is a token that the model does not have, so that no response ends."""
    found = text_tokenizer(ChatTemplate(load_tokenizer(job.base)))
    found.add_special_tokens({"eos_token": "<|never|>"})
    return found


def _reward(job: Job, drawn: Drawn, pad_id: int, length: int) -> Callable[..., list[float]]:
    """The reward model's scores; it makes sure that prompts and lengths are as they should be."""
    model = classifier(job, torch.bfloat16 if job.dtype == "bfloat16" else torch.float32).to(job.device).eval()

    @torch.no_grad()
    def score(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        asked = [list(as_tokens(prompt)) for prompt in prompts]
        drawn.require_next(asked)
        if {len(each) for each in completion_ids} != {length}:
            raise ValueError("a response ended before its full length")
        paths = [[*prompt, *ids] for prompt, ids in zip(asked, completion_ids, strict=True)]
        width = max(map(len, paths))
        padding = [width - len(path) for path in paths]
        tokens = torch.tensor([path + [pad_id] * gap for gap, path in zip(padding, paths, strict=True)])
        states = model.base_model(tokens.to(job.device)).last_hidden_state  # causal: nothing sees the padding
        ends = torch.tensor([len(path) - 1 for path in paths], device=job.device)
        last = states[torch.arange(len(paths), device=job.device), ends]
        found: list[float] = model.score(last).squeeze(-1).float().tolist()
        return found

    return score


def _follow(trainer: RLOOTrainer, phases: Phases) -> None:
    """Have the trainer tell when its sampling and its scoring end."""
    trainer._generate = phases.marking("rollout", trainer._generate)
    scoring = phases.marking("scoring", trainer._generate_and_score_completions)
    trainer._generate_and_score_completions = scoring


if __name__ == "__main__":
    main()
