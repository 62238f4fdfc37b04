"""The settings of programmatic rewards: one small model per rule, told apart by the field `rule`.

A list of rules is a mixture: the reward of a response is the weighted sum of what each rule gives it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from pipeline.servers import Server
from pipeline.settings import Number, Positive, Settings

Gold = Literal["none", "world", "exact", "numeric", "instructions"]
"""A rule that knows which responses are correct, or none."""


class WeightedRule(Settings):
    """What every rule has."""

    weight: Number = 1.0
    """What the rule's reward is multiplied by in the sum; negative for what should be avoided."""

    @model_validator(mode="after")
    def _counts(self) -> WeightedRule:
        if self.weight == 0:
            raise ValueError("weight=0 does nothing: leave the rule out")
        return self


class WorldRule(WeightedRule):
    """The embedded world's gold reward: correct, polite and concise. Needs prompts of the embedded world."""

    rule: Literal["world"] = "world"
    """Name of the rule."""


class ExactRule(WeightedRule):
    """1 for the prompt's `answer`, whatever its case, spacing, quotation marks and closing punctuation; else 0."""

    rule: Literal["exact"] = "exact"
    """Name of the rule."""


class NumericRule(WeightedRule):
    """1 when the last number of the response equals the last one of the prompt's `answer`; else 0."""

    rule: Literal["numeric"] = "numeric"
    """Name of the rule."""


class InstructionsRule(WeightedRule):
    """The share of the prompt's verifiable instructions that the response follows (IFEval, arXiv 2311.07911). Needs
    prompts with the columns `instruction_id_list` and `kwargs`; a response is correct when it follows all of them."""

    rule: Literal["instructions"] = "instructions"
    """Name of the rule."""


def _compiles(expression: str) -> str:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression of Python's: {error}") from None
    return expression


class PatternRule(WeightedRule):
    """1 when a regular expression is found anywhere in the response; else 0."""

    rule: Literal["pattern"] = "pattern"
    """Name of the rule."""
    expression: Annotated[str, Field(min_length=1), AfterValidator(_compiles)]
    """Regular expression in Python's syntax; `(?i)` at its beginning ignores case, `\\A` and `\\Z` anchor it."""


class FormatRule(WeightedRule):
    """1 when the response is laid out as asked; else 0."""

    rule: Literal["format"] = "format"
    """Name of the rule."""
    layout: Literal["json", "tags"]
    """`json`: the whole response is one JSON value. `tags`: it is exactly the tagged parts in `tags`, in this order,
    with nothing but white space around them."""
    tags: list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]] = []
    """With `tags`: names of the parts; `think` is what stands between `<think>` and `</think>`."""

    @model_validator(mode="after")
    def _tags_fit_the_layout(self) -> FormatRule:
        if (self.layout == "tags") != bool(self.tags):
            raise ValueError("layout=tags needs `tags`, as in `tags: [think, answer]`; other layouts take none")
        if len(set(self.tags)) < len(self.tags):
            raise ValueError("a part is named twice in `tags`: name each once")
        return self


class LengthRule(WeightedRule):
    """1 for up to `words` words, falling linearly to 0 at twice as many."""

    rule: Literal["length"] = "length"
    """Name of the rule."""
    words: Positive
    """Longest response that gets 1."""


class RepetitionRule(WeightedRule):
    """1 minus the share of runs of `n` words that occurred before in the response."""

    rule: Literal["repetition"] = "repetition"
    """Name of the rule."""
    n: Positive = 3
    """Words of a run."""


class ServerRule(Server, WeightedRule):
    """A reward that an HTTP server of yours computes; any finite number (`docs/rewards.md` has the protocol)."""

    rule: Literal["server"] = "server"
    """Name of the rule."""
    rows_per_request: Positive = 64
    """Responses that are sent at once."""


Rule = Annotated[
    WorldRule
    | ExactRule
    | NumericRule
    | InstructionsRule
    | PatternRule
    | FormatRule
    | LengthRule
    | RepetitionRule
    | ServerRule,
    Field(discriminator="rule"),
]
"""Any rule."""

RULES: dict[str, type[WeightedRule]] = {
    model.model_fields["rule"].default: model for model in get_args(get_args(Rule)[0])
}
"""Name of a rule -> its settings."""
