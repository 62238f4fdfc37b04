"""Proximal policy optimisation against learned or programmatic rewards (Schulman et al. 2017; Ouyang et al. 2022).

One base in memory carries four roles: the policy (an adapter), the reference (the adapter off, or the frozen
adapter that the policy began as), the reward model and the value function (an adapter and a scalar head each;
the value starts as a copy of the reward model). Each round samples responses to prompts, scores them, takes an estimate
of the divergence from the reference off the reward, estimates advantages by GAE, whitens them over the rollout,
and updates policy and value with clipped losses in separate forward and backward passes. Losses are normalised
by the tokens of the whole minibatch. A response that does not end its turn is penalised and treated as finished.

With `advantage: rloo` or `grpo`, a response is compared with the others to its prompt instead, and there is no value
function. Left out: experience of earlier rounds, rewards within a response, and a reference that moves.

    python -m stages.ppo CONFIG [key=value ...]
"""

from __future__ import annotations

from data.batch import Layout
from pipeline.config import PpoSettings
from pipeline.contract import Context, Result
from stages.core.rl.learner import PolicyGradient
from stages.core.rl.training import train
from stages.core.rl.trunk import Trunk
from stages.core.roles import REFERENCE, REWARD, VALUE, Roles


def run(context: Context) -> Result:
    """Train the policy; its adapter is the result, the value function is dropped.

    Raises:
        DataError: There is no prompt, or a rule misses what it needs.
        ArtifactError: The policy or the reward model is damaged, or they sit on different bases.
        NumericalError: The preflight failed, or a loss or gradient is not finite.
    """
    return train(context, learner)


def learner(settings: PpoSettings, roles: Roles, layout: Layout, trunk: Trunk) -> PolicyGradient:
    """Policy and, for GAE, a value function; both are computed above the trunk."""
    if settings.advantage == "gae":
        add_value(roles, settings)
    return PolicyGradient(roles, settings, trunk)


def add_value(roles: Roles, settings: PpoSettings) -> None:
    """The value function: a copy of the reward model where there is one, so that it is of use at once; else a
    fresh head, on the policy's states or on an adapter that starts as the policy does."""
    if settings.value == "adapter" and settings.reward:
        roles.copy(REWARD, VALUE)
        return
    if settings.value == "adapter":
        if roles.has(REFERENCE):
            roles.copy(REFERENCE, VALUE)
        else:
            roles.add(VALUE, settings.lora)
    roles.add_head(VALUE)


if __name__ == "__main__":
    from pipeline.launch import main

    main("ppo")
