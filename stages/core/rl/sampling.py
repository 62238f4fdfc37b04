"""Responses that a policy samples to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.batch import TreeBatch
from data.template import ChatTemplate
from data.tree import Tree
from pipeline.config import Rewarded
from stages.core.rl.prompts import EncodedPrompt
from stages.core.roles import POLICY, Roles
from stages.core.rollout import Sample, sample, trees_of


@dataclass(frozen=True)
class Rollout:
    """Sampled responses to prompts.

    Attributes:
        prompts: The prompts.
        samples: [prompts * n] n responses to each prompt side by side.
    """

    prompts: Sequence[EncodedPrompt]
    samples: Sequence[Sample]

    @property
    def per_prompt(self) -> int:
        """Responses to each prompt."""
        return len(self.samples) // len(self.prompts)

    @property
    def repeated(self) -> list[EncodedPrompt]:
        """The prompt of each response."""
        return [prompt for prompt in self.prompts for _ in range(self.per_prompt)]

    def trees(self) -> list[Tree]:
        """A tree for each prompt, numbered by its place, with a branch for each of its responses."""
        made = trees_of([each.tokens for each in self.prompts], self.samples)
        return [replace(tree, origin=prompt.row.origin) for tree, prompt in zip(made, self.prompts, strict=True)]

    def texts(self, template: ChatTemplate) -> list[str]:
        """The responses as text."""
        return [template.decode(each.tokens) for each in self.samples]

    def of(self, batch: TreeBatch) -> list[int]:
        """Places among the samples of a batch's branches, whose trees are of `trees`."""
        count = self.per_prompt
        return [tree.number * count + branch for tree in batch.trees for branch in range(count)]


class Sampler:
    """Samples responses as the policy, in the way the settings ask for."""

    def __init__(self, roles: Roles, settings: Rewarded) -> None:
        self._roles, self._settings = roles, settings

    def rollout(self, prompts: Sequence[EncodedPrompt], seed: int, per_prompt: int | None = None) -> Rollout:
        """Responses to prompts, `samples_per_prompt` to each unless told otherwise."""
        settings, base = self._settings, self._roles.base
        with self._roles.use(POLICY), base.compute.autocast():
            samples = sample(
                base.model,
                [each.tokens for each in prompts],
                stop_id=base.template.stop_id,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=seed,
                tokens_per_batch=settings.batch_tokens,
                per_prompt=per_prompt or settings.samples_per_prompt,
                backend=settings.sampler,
            )
        return Rollout(prompts, samples)
