"""Several models side by side, with one base in memory for all that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from data.template import tokenizer_record
from pipeline.contract import Artifact
from pipeline.errors import ConfigError
from pipeline.references import model_name
from stages.core import handover, probes
from stages.core.device import Compute
from stages.core.models import LanguageModel
from stages.core.roles import REFERENCE, REWARD, Roles, base_of, open_base
from stages.core.scoring import replay_probes, reward_scores


@dataclass(frozen=True)
class Contestant:
    """A model in the line-up: its name, the role it plays on its base, and its parent's name if that is there too."""

    name: str
    artifact: Artifact
    roles: Roles
    role: str
    parent: str | None

    @contextmanager
    def use(self) -> Iterator[LanguageModel]:
        """Compute as this model."""
        with self.roles.use(self.role):
            yield self.roles.base


class Lineup:
    """Models by name, parents before children, each checked against its probes.

    Args:
        models: The models, by whatever the caller calls them.
        compute: Device and precision.
        named: Source of a model -> its name in the line-up.

    Raises:
        ConfigError: Two models have the same name.
        ArtifactError: A model is damaged or not what its manifest says.
    """

    def __init__(
        self, models: Mapping[str, Artifact], compute: Compute, *, named: Callable[[str], str] | None = None
    ) -> None:
        self._compute, self._named = compute, named or model_name
        self._bases: dict[tuple[str, str, str], Roles] = {}
        self.contestants: dict[str, Contestant] = {}
        for artifact in _parents_first(list(models.values())):
            self._enter(artifact)

    def judge(self, artifact: Artifact) -> Roles:
        """The base of a reward model with the model loaded in the role `reward`."""
        roles = self._base(artifact)
        roles.load(REWARD, artifact.directory)
        probes.replay(artifact.directory, lambda trees: reward_scores(roles, REWARD, trees), roles.base)
        return roles

    def _enter(self, artifact: Artifact) -> None:
        name = self._named(artifact.source)
        if name in self.contestants:
            raise ConfigError(f"two models are called `{name}`", where="models", hint="name each model once")
        roles, role = self._base(artifact), REFERENCE
        if artifact.kind == "adapter":
            role = f"model-{len(self.contestants)}"
            roles.load(role, artifact.directory)
        contestant = Contestant(name, artifact, roles, role, self._parent(artifact))
        with contestant.use() as language_model:
            replay_probes(artifact, language_model)
        self.contestants[name] = contestant

    def _parent(self, artifact: Artifact) -> str | None:
        digests = {each.artifact.digest: name for name, each in self.contestants.items()}
        return digests.get(parent_digest(artifact) or "")

    def _base(self, artifact: Artifact) -> Roles:
        base, quantization = base_of(artifact)
        template = tokenizer_record(handover.open_tokenizer(artifact))["chat_template"]
        key = base.digest, quantization, template
        if key not in self._bases:
            self._bases[key] = open_base(artifact, self._compute)
        return self._bases[key]


def parent_digest(artifact: Artifact) -> str | None:
    """Content digest of the policy that a model was trained from; None for one trained from nothing."""
    policy = artifact.manifest.inputs.get("policy") if artifact.manifest else None
    return policy.digest if policy else None


def _parents_first(artifacts: list[Artifact]) -> list[Artifact]:
    ordered: list[Artifact] = []
    waiting = artifacts
    while waiting:
        digests = {each.digest for each in waiting}
        ready = [each for each in waiting if parent_digest(each) not in digests - {each.digest}]
        ordered += ready or waiting
        waiting = [each for each in waiting if ready and each not in ready]
    return ordered
