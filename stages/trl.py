"""Any of TRL's trainers as a stage, so that its methods join the chain and Baton's can be compared with them.

TRL computes the loss; what goes in and what comes out is Baton's. The examples and their order are those of Baton's
own stages, token for token (`stages/core/trl/text.py` says how); the adapter is stored as other stages store theirs,
a reward model with its scalar head, centred. Trainers are configured and followed by a callback, nothing of theirs is
overridden. A stage that was stopped goes on exactly, as other stages do, in a new trainer on the rows that are left
(`stages/core/trl/keeping.py`); those that keep more than that over their steps begin anew, and say so. Left out:
trainers that need a second model, a server or prompts of their own (`docs/trl.md` names them), margins of preferences,
and TRL's own evaluation and checkpoints.

    python -m stages.trl CONFIG [key=value ...]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback

from data.template import ChatTemplate, tokenizer_record
from pipeline.config import TrlSettings
from pipeline.contract import Artifact, Context, Result
from pipeline.errors import ConfigError
from pipeline.manifest import Metric
from stages.core import device, loop, optim
from stages.core.centring import centre
from stages.core.device import Compute
from stages.core.roles import POLICY, REFERENCE, REWARD, adaptation
from stages.core.trained import Trained
from stages.core.trl import arguments, models, results, rewards, rows
from stages.core.trl.arguments import Classes
from stages.core.trl.following import Follower
from stages.core.trl.keeping import Keeper
from stages.core.trl.rows import Material
from stages.core.trl.text import text_tokenizer


def run(context: Context) -> Result:
    """Train, measure on held-out rows, and store.

    Raises:
        ConfigError: The trainer does not know an argument, or refuses a combination of them.
        DataError: No row can be used.
        ArtifactError: The policy or the reward model is damaged or not what its manifest says.
        NumericalError: A loss or gradient is not finite.
    """
    settings, compute = context.settings, device.for_stage(context)
    policy = context.inputs["policy"]
    _require_weights_to_train(context, policy)
    optim.require_support(settings.optimizer, compute.device)
    classes = arguments.classes(settings.trainer, settings.method)
    arguments.check(context, classes)
    material, template = _read(context, policy, compute)
    follower = Follower(context, material.origins, material.steps)
    keeper = Keeper(context, follower)
    with tempfile.TemporaryDirectory(dir=context.directory) as scratch:
        chosen = arguments.build(context, classes, compute, material.steps - follower.taken, Path(scratch))
        job = _Job(context, policy, compute, material, template, Path(scratch), follower, keeper)
        metrics = job.train(classes, chosen)
    compares = settings.method.compares and getattr(chosen, "beta", None) != 0
    return Result(
        kind=settings.produces,
        metrics=metrics | results.sampling_metrics(follower.history if settings.method.samples else []),
        data=material.cards,
        adaptation=adaptation(policy, reference=policy if compares else None) if settings.lora else None,
        tokenizer=tokenizer_record(template.tokenizer),
        tokens=follower.tokens,
        compute=compute.record,
        warnings=follower.alarms.warnings,
    )


class _Job:
    """One training: models are in memory only while they are needed."""

    def __init__(
        self,
        context: Context,
        policy: Artifact,
        compute: Compute,
        material: Material,
        template: ChatTemplate,
        scratch: Path,
        follower: Follower,
        keeper: Keeper,
    ) -> None:
        self.context, self.policy, self.compute = context, policy, compute
        self.material, self.template, self.scratch = material, template, scratch
        self.follower, self.keeper = follower, keeper
        self.settings: TrlSettings = context.settings

    def train(self, classes: Classes, chosen: Any) -> dict[str, Metric]:
        """Train and store; returns what the held-out rows say of the result."""
        if self.settings.lora is None:
            model: Any = models.whole(self.policy, self.compute)
            self._train(classes, chosen, model)
            return self._store_model(model)
        loop.seed_everything(self.context.seed)
        first = models.first_adapter(self.policy, self.settings.lora, self.compute, self.scratch / "first")
        scored = self.settings.produces == "reward"
        model = models.adapted(self.policy, first, self.compute, scored=scored)
        self._train(classes, chosen, model)
        models.write_adapter(model, first, self.scratch / "trained")
        del model
        return self._store_reward() if scored else self._store_adapter()

    def _train(self, classes: Classes, chosen: Any, model: Any) -> None:
        """Take the steps that are left."""
        trained = Trained(model.named_parameters(), self.settings.optimizer)
        if self.follower.taken == self.material.steps:
            self.keeper.take_up(trained)
            return
        trainer = self._trainer(classes, chosen, model, trained)
        self.follower.count(model)
        with self.keeper.steps(trained), arguments.expected_warnings(), arguments.refusals(self.context):
            trainer.train()

    def _trainer(self, classes: Classes, chosen: Any, model: Any, trained: Trained) -> Any:
        """TRL's, on the rows that are left."""
        given: dict[str, Any] = {"model": model, "args": chosen, "train_dataset": self.material.dataset}
        if self.settings.method.samples:
            given["reward_funcs"] = rewards.functions(self.context, self.template, self.compute)
            model.generation_config.eos_token_id = self.template.stop_id
        given["optimizers"] = self._optimizers(trained)
        given["callbacks"] = [self.follower, self.keeper]
        with arguments.expected_warnings(), arguments.refusals(self.context):
            trainer = classes.trainer(**given, processing_class=text_tokenizer(self.template))
        trainer.remove_callback(PrinterCallback)
        # Only now: what is computed of all rows beforehand is computed in the same batches.
        trainer.train_dataset = trainer.train_dataset.skip(self.follower.taken * self.settings.examples_per_step)
        return trainer

    def _optimizers(self, trained: Trained) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Baton's optimizer of what is to be trained, and its schedule from the next step on."""
        (optimizer,) = trained.optimizers
        settings, taken, total = self.settings.optimizer, self.follower.taken, self.material.steps
        return optimizer, LambdaLR(optimizer, lambda step: optim.scale(settings, taken + step, total))

    def _store_model(self, model: Any) -> dict[str, Metric]:
        reference = models.open_policy(self.policy, self.compute).base
        before = results.branch_logprobs(reference, self.material.held_out)
        del reference
        trained = models.trained_weights(model, self.policy, self.compute)
        saved = results.store_model(trained, self.context.directory, self.material.probed)
        return self._metrics(results.branch_logprobs(saved, self.material.held_out), before)

    def _store_adapter(self) -> dict[str, Metric]:
        roles = models.open_policy(self.policy, self.compute)
        roles.load(POLICY, self.scratch / "trained")
        results.store_adapter(roles, self.context.directory, self.material.probed)
        with roles.use(REFERENCE):
            before = results.branch_logprobs(roles.base, self.material.held_out)
        with roles.use(POLICY):
            after = results.branch_logprobs(roles.base, self.material.held_out)
        return self._metrics(after, before)

    def _store_reward(self) -> dict[str, Metric]:
        roles = models.open_policy(self.policy, self.compute)
        roles.load(REWARD, self.scratch / "trained")
        before = centre(
            roles,
            self.material.trees,
            max_length=self.settings.max_length,
            seed=self.context.seed,
            tokens_per_batch=results.TOKENS_PER_BATCH,
            layout="plain",
        )
        results.store_reward(roles, self.context.directory, self.material.probed)
        return {"sample_score": before, **results.reward_metrics(roles, self.material.held_out)}

    def _metrics(self, after: results.Logprobs, before: results.Logprobs) -> dict[str, Metric]:
        if self.settings.method.layout == "conversation":
            return results.loss_metrics(after, self.material.held_out)
        return results.implicit_metrics(after, before, self.material.held_out)


def _require_weights_to_train(context: Context, policy: Artifact) -> None:
    if context.settings.lora is None and policy.kind != "model":
        raise ConfigError(
            f"`{policy.source}` is an adapter: all weights can be trained of a model only",
            where=f"stages.{context.name}.lora",
            hint="give `lora`, or a model as `policy`",
        )


def _read(context: Context, policy: Artifact, compute: Compute) -> tuple[Material, ChatTemplate]:
    """The rows, and the template that made tokens of them; the policy is checked on the way."""
    language_model = models.open_policy(policy, compute).base
    return rows.read(context, language_model), language_model.template


if __name__ == "__main__":
    from pipeline.launch import main

    main("trl")
