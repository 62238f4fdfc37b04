"""The reward of several rules: the weighted sum of what each of them gives a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from data.schema import Prompt
from pipeline.rules import FormatRule, LengthRule, PatternRule, RepetitionRule, Rule, ServerRule
from reward import rules
from reward.server import RewardServer

Rewards = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
"""Takes prompts and a response to each; gives a reward each."""


class RuleMixture:
    """Rules with their weights.

    Raises:
        ConfigError: A server's token is not in the environment.
    """

    def __init__(self, settings: Sequence[Rule]) -> None:
        self._names = {each.rule for each in settings}
        self._parts: list[tuple[float, Rewards]] = [(each.weight, _rewards_of(each)) for each in settings]

    def require_facts(self, prompts: Sequence[Prompt]) -> None:
        """See that every prompt holds what the rules need.

        Raises:
            DataError: A prompt does not; names its origin.
        """
        for prompt in prompts:
            rules.require_facts(self._names, prompt)

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The reward of each response.

        Args:
            prompts: The prompts with their facts, one per response.
            responses: The texts, without control tokens.

        Raises:
            ConfigError: A server's name leads to an address that is not allowed.
            DataError: A prompt does not hold what a rule needs; names the prompt's origin.
            ServerError: A reward server is out of reach or breaks the protocol.
        """
        sums = [0.0] * len(responses)
        for weight, rewards in self._parts:
            given = rewards(prompts, responses)
            sums = [total + weight * reward for total, reward in zip(sums, given, strict=True)]
        return sums


def _rewards_of(rule: Rule) -> Rewards:
    return RewardServer(rule).rewards if isinstance(rule, ServerRule) else partial(_one_by_one, rule)


def _one_by_one(rule: Rule, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    return [_reward(rule, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _reward(rule: Rule, prompt: Prompt, response: str) -> float:
    match rule:
        case PatternRule():
            return rules.pattern(response, rule.expression)
        case FormatRule(layout="json"):
            return rules.is_json(response)
        case FormatRule():
            return rules.tagged(response, rule.tags)
        case LengthRule():
            return rules.length(response, rule.words)
        case RepetitionRule():
            return rules.repetition(response, rule.n)
    return rules.verdict(rule.rule, prompt.facts, response, prompt.origin).reward
