"""Evaluation suites: a small YAML file that says what is measured, where its rows are, and how they are scored.

A suite is a data source with a way to answer its rows and a way to score the answers, one number a row. Its name is
that of its file. `docs/evaluation.md` has an example of each method.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt, TypeAdapter, model_validator

from pipeline.config import DataSource, Either
from pipeline.rules import Gold, Rule
from pipeline.settings import Fraction, Number, Positive


def _greedy_or_warm(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError("should be 0, which takes the likeliest token, or at least 0.01")
    return value


Decoding = Annotated[Number, Field(ge=0.0, le=100.0), AfterValidator(_greedy_or_warm)]


class Suite(DataSource):
    """What every suite has; the settings of a data source say where its rows are."""

    KINDS: ClassVar[tuple[str, ...]] = ()
    """Kinds of rows that the method takes."""
    BETTER: ClassVar[Literal["higher", "lower"]] = "higher"
    """Which figures are better."""

    kind: Literal["suite"]
    """`suite`."""
    measures: Annotated[str, Field(min_length=1)]
    """What a high figure says, in a sentence for the report."""
    held_out: Fraction = 1.0
    """Share of the prompts that are asked. All, for rows that nothing is trained on; for rows that a run's data may
    hold, too, at most the share that the run holds out."""

    @property
    def yes_or_no(self) -> bool:
        """Whether every number is 0 or 1, so that their mean is a proportion."""
        return True

    @property
    def share(self) -> bool:
        """Whether figures are shares, from 0 to 1."""
        return True


class LikelihoodSuite(Suite):
    """Bits per byte of documents, each from its first token on, and their perplexity; lower is better."""

    KINDS: ClassVar = ("text",)
    BETTER: ClassVar = "lower"

    method: Literal["likelihood"]
    """Name of the method."""

    @property
    def yes_or_no(self) -> bool:
        """Bits are neither."""
        return False

    @property
    def share(self) -> bool:
        """Nor shares."""
        return False


class ChoiceSuite(Suite):
    """Whether the best of several responses is the likeliest to the model, and by itself so."""

    KINDS: ClassVar = ("preference",)

    method: Literal["choice"]
    """Name of the method."""
    normalised: StrictBool = False
    """Divide a response's log-likelihood by its tokens, so that short ones are not the likelier for it."""


class PreferenceSuite(Suite):
    """Whether the stage's reward model scores the best of several responses highest."""

    KINDS: ClassVar = ("preference",)

    method: Literal["preference"]
    """Name of the method."""


class SampledSuite(Suite):
    """What suites have whose prompts are answered."""

    KINDS: ClassVar = ("prompt",)

    max_new_tokens: Positive = 64
    """Longest response."""


class GenerationSuite(SampledSuite):
    """What a rule says of the responses."""

    method: Literal["generation"]
    """Name of the method."""
    gold: Gold = "none"
    """Rule that knows which responses are correct; the number of a row is 1 or 0."""
    rules: list[Rule] = []
    """Rules instead, whose weighted sum is the number of a row."""
    temperature: Either[Decoding, Annotated[list[Decoding], Field(min_length=2)]] = 0.0
    """Of the samples; 0 takes the likeliest token. With a list, the prompts are answered at each of them."""
    samples: Positive = 1
    """Responses to each prompt at each temperature; a row's number is their mean."""

    @property
    def temperatures(self) -> list[float]:
        """One or several."""
        return self.temperature if isinstance(self.temperature, list) else [self.temperature]

    @property
    def yes_or_no(self) -> bool:
        """Only the verdict on a single response is."""
        return self.part_yes_or_no and len(self.temperatures) == 1

    @property
    def part_yes_or_no(self) -> bool:
        """Whether every number at one of the temperatures is 0 or 1."""
        return self.gold != "none" and self.samples == 1

    @property
    def share(self) -> bool:
        """Sums of rules may be anything."""
        return self.gold != "none"

    @model_validator(mode="after")
    def _has_one_judge(self) -> GenerationSuite:
        if (self.gold == "none") != bool(self.rules):
            raise ValueError("give either `gold`, a rule that knows what is correct, or `rules`")
        return self

    @model_validator(mode="after")
    def _samples_differ(self) -> GenerationSuite:
        if self.samples > 1 and 0.0 in self.temperatures:
            raise ValueError(f"samples={self.samples} are all the same at temperature 0: raise it, or take one")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("a temperature is named twice: name each once")
        return self


class InstructionSuite(SampledSuite):
    """Whether the likeliest response follows all verifiable instructions of its prompt (IFEval, Zhou et al. 2023,
    arXiv 2311.07911): of prompts and of single instructions, strictly and loosely, and of each family of instructions.
    Rows have `instruction_id_list` and `kwargs` beside the prompt, as in the published file."""

    method: Literal["instructions"]
    """Name of the method."""


class InvarianceSuite(SampledSuite):
    """The share of groups of prompts, by the column `group`, whose responses all get the same verdict."""

    method: Literal["invariance"]
    """Name of the method."""
    gold: Literal["world", "exact", "numeric"]
    """Rule that knows which responses are correct."""


class DiversitySuite(SampledSuite):
    """How different several responses to one prompt are, from 0 to 1."""

    method: Literal["diversity"]
    """Name of the method."""
    measure: Literal["distinct", "dissimilarity"] = "distinct"
    """`distinct`: the share of runs of `n` words that are different ones (Li et al. 2016, arXiv 1510.03055);
    `dissimilarity`: 1 minus the mean share of runs that two responses have in common."""
    n: Positive = 2
    """Words of a run."""
    samples: Annotated[StrictInt, Field(ge=2)] = 8
    """Responses to each prompt."""
    temperature: Annotated[Decoding, Field(gt=0.0)] = 1.0
    """Of the samples."""

    @property
    def yes_or_no(self) -> bool:
        """Shares are neither."""
        return False


METHODS: dict[str, type[Suite]] = {
    "likelihood": LikelihoodSuite,
    "choice": ChoiceSuite,
    "preference": PreferenceSuite,
    "generation": GenerationSuite,
    "instructions": InstructionSuite,
    "invariance": InvarianceSuite,
    "diversity": DiversitySuite,
}
"""Method -> the settings of its suites."""


AnySuite = Annotated[
    LikelihoodSuite
    | ChoiceSuite
    | PreferenceSuite
    | GenerationSuite
    | InstructionSuite
    | InvarianceSuite
    | DiversitySuite,
    Field(discriminator="method"),
]


def json_schema() -> dict[str, Any]:
    """Of suite files: every setting with its meaning and default, by method."""
    return TypeAdapter(AnySuite).json_schema()


def model_of(values: Any) -> type[Suite] | None:
    """The settings that the content of a suite's file is meant as; None when it names no method."""
    method = values.get("method") if isinstance(values, dict) else None
    return METHODS.get(method) if isinstance(method, str) else None
