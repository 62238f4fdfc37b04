"""Who judges responses in a comparison of models, beside the rule that knows what is correct."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

from data.schema import Prompt
from pipeline.config import EvaluateSettings
from pipeline.contract import Context
from pipeline.errors import ConfigError, ServerError
from pipeline.references import model_name
from pipeline.rules import Rule
from pipeline.servers import JudgeServer, placed
from reward.comparison import Judgement
from reward.mixture import RuleMixture
from reward.pair_judge import PairJudge
from stages.core.answers import Answers
from stages.core.lineup import Lineup
from stages.core.roles import Roles

Judge = TypeVar("Judge")
Said = TypeVar("Said")


@dataclass(frozen=True)
class Judges:
    """The judges that a stage names.

    A server that answers at first and fails later is given up: what it said of some models stays, nobody asks it again,
    and all else is measured, since answers that took hours are worth more than one judge.

    Attributes:
        reward: The reward model, in the role `reward`; None without one.
        reward_name: What its own figures are under.
        rules: By name; they give each response a score, as the reward model does.
        pairs: By name; they are shown two responses.
        given_up: Judges that failed, by name, and how.
    """

    reward: Roles | None
    reward_name: str
    rules: Mapping[str, RuleMixture]
    pairs: Mapping[str, PairJudge]
    given_up: dict[str, str] = field(default_factory=dict)

    @classmethod
    def named_in(cls, context: Context, lineup: Lineup) -> Self:
        """Load the reward model and make ready for the rest.

        Raises:
            ArtifactError: The reward model is damaged or not what its manifest says.
            ConfigError: The environment does not hold the token that a server's settings name, or the reward model is
                called like a model of the line-up, whose figures it would take the place of.
        """
        chosen, artifact = context.settings.judges.items(), context.inputs.get("reward")
        name = model_name(artifact.source) if artifact else ""
        if name in lineup.contestants:
            hint = "copy one of them to a directory of another name"
            raise ConfigError(f"the reward model and a model are both called `{name}`", where="reward", hint=hint)
        return cls(
            reward=lineup.judge(artifact) if artifact else None,
            reward_name=name,
            rules={name: RuleMixture(judge) for name, judge in chosen if isinstance(judge, list)},
            pairs={name: PairJudge(judge) for name, judge in chosen if isinstance(judge, JudgeServer)},
        )

    def try_out(self, prompts: Sequence[Prompt]) -> None:
        """Ask each judge about one prompt, so that a mistake in its settings shows before models answer any, and see
        that the rules find what they need in all.

        Raises:
            DataError: A prompt does not hold what a rule needs; names the prompt's origin.
            ServerError: A server is out of reach or breaks the protocol.
        """
        first = prompts[:1]
        for name, rules in self.rules.items():
            with placed(f"judges.{name}"):
                rules.require_facts(prompts)
                rules.scores(first, _TRIED[:1])
        for name, judge in self.pairs.items():
            with placed(f"judges.{name}"):
                judge.compare(first, *([text] for text in _TRIED))

    def score_by_rules(self, answers: Answers, prompts: Sequence[Prompt]) -> Answers:
        """The same answers, one to each prompt, with what the rules give them.

        Raises:
            DataError: A prompt does not hold what a rule needs; names the prompt's origin.
        """
        return replace(answers, by_rules=self._asked(self.rules, lambda rules: rules.scores(prompts, answers.texts)))

    def compare(self, own: Answers, parent: Answers, prompts: Sequence[Prompt]) -> dict[str, Judgement]:
        """What those say that are shown a model's and its parent's response to each prompt."""
        return self._asked(self.pairs, lambda judge: judge.compare(prompts, own.texts, parent.texts))

    def _asked(self, judges: Mapping[str, Judge], ask: Callable[[Judge], Said]) -> dict[str, Said]:
        said: dict[str, Said] = {}
        for name, judge in judges.items():
            if name in self.given_up:
                continue
            try:
                said[name] = ask(judge)
            except ServerError as error:
                self.given_up[name] = error.in_a_line()
        return said


_TRIED = ("Yes.", "No.")
"""Responses that judges are tried out on."""


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
