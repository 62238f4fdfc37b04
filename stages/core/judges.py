"""Who judges responses in a comparison of models, beside the rule that knows what is correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from data.schema import Prompt
from pipeline.config import EvaluateSettings
from pipeline.contract import Context
from pipeline.rules import Rule
from pipeline.servers import JudgeServer
from reward.mixture import RuleMixture
from reward.pair_judge import PairJudge
from stages.core.answers import Answers
from stages.core.lineup import Lineup
from stages.core.roles import Roles


@dataclass(frozen=True)
class Judges:
    """The judges that a stage names.

    Attributes:
        reward: The reward model, in the role `reward`; None without one.
        rules: By name; they give each response a score, as the reward model does.
        pairs: By name; they are shown two responses.
    """

    reward: Roles | None
    rules: Mapping[str, RuleMixture]
    pairs: Mapping[str, PairJudge]

    @classmethod
    def named_in(cls, context: Context, lineup: Lineup) -> Self:
        """Load the reward model and make ready for the rest.

        Raises:
            ArtifactError: The reward model is damaged or not what its manifest says.
            ConfigError: The environment does not hold the token that a server's settings name.
        """
        chosen = context.settings.judges.items()
        return cls(
            reward=lineup.judge(context.inputs["reward"]) if "reward" in context.inputs else None,
            rules={name: RuleMixture(judge) for name, judge in chosen if isinstance(judge, list)},
            pairs={name: PairJudge(judge) for name, judge in chosen if isinstance(judge, JudgeServer)},
        )

    def score_by_rules(self, answers: Answers, prompts: Sequence[Prompt]) -> Answers:
        """The same answers, one to each prompt, with what the rules give them.

        Raises:
            DataError: A prompt does not hold what a rule needs; names the prompt's origin.
            ServerError: A reward server is out of reach or breaks the protocol.
        """
        return replace(
            answers, by_rules={name: rules.scores(prompts, answers.texts) for name, rules in self.rules.items()}
        )


def in_words(context: Context) -> dict[str, str]:
    """Every judge of a stage, the rule that knows what is correct included, and what it is."""
    settings: EvaluateSettings = context.settings
    gold = {} if settings.gold == "none" else {"gold": f"the rule {settings.gold}"}
    reward = {"reward": f"the reward model {context.inputs['reward'].source}"} if "reward" in context.inputs else {}
    return gold | reward | {name: _in_words(judge) for name, judge in settings.judges.items()}


def _in_words(judge: list[Rule] | JudgeServer) -> str:
    if isinstance(judge, JudgeServer):
        return f"the model {judge.model}"
    rules = [each.rule if each.weight == 1 else f"{each.weight:g} x {each.rule}" for each in judge]
    return f"the rule{'s' if len(rules) > 1 else ''} {' + '.join(rules)}"
