"""The numbers that a model's rows of a suite get: one for every observation, which is a row or a group of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from data.suite_rows import Item
from data.tree import preference_tree, usable
from pipeline.config import Decoding, EvaluateSettings
from pipeline.figures import PERPLEXITY
from pipeline.manifest import Metric
from pipeline.rules import Gold, Rule
from pipeline.suites import (
    ChoiceSuite,
    DiversitySuite,
    GenerationSuite,
    InstructionSuite,
    InvarianceSuite,
    LikelihoodSuite,
    SampledSuite,
    Suite,
)
from reward import diversity, instructions
from reward.mixture import RuleMixture
from reward.rules import verdict
from stages.core.answers import PLAIN, Responses, respond
from stages.core.documents import perplexity, text_likelihoods
from stages.core.lineup import Contestant
from stages.core.roles import REWARD, Roles
from stages.core.scoring import logprobs, scores

Numbers = dict[int, float]
"""Place of an observation -> its number; one that does not fit the model has none."""


@dataclass(frozen=True)
class Part:
    """Other numbers of the observations, such as those under one of several conditions.

    Attributes:
        numbers: Of the observations that have one.
        yes_or_no: Whether they are 0 or 1.
        weights: What the numbers count in their mean, where they do not count alike.
    """

    numbers: Numbers
    yes_or_no: bool
    weights: Numbers = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """What one model got on one suite.

    Attributes:
        numbers: Of all observations.
        parts: By what they are called: `at 0.5` is a temperature.
        weights: What the numbers count in their mean, where they do not count alike.
        further: Other figures of the whole suite, by the ending of their names.
        responses: By observation; empty where nothing is answered.
        tokens: Sampled in all.
        cut: Prompts that lost their beginning, since they left no room for a response.
    """

    numbers: Numbers
    parts: Mapping[str, Part] = field(default_factory=dict)
    weights: Numbers = field(default_factory=dict)
    further: Mapping[str, Metric] = field(default_factory=dict)
    responses: Sequence[Sequence[str]] = ()
    tokens: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Observation:
    """What gets a number: its name, its category, and the places of its rows."""

    id: str
    category: str
    places: tuple[int, ...]


Scorer = Callable[[Contestant], Scores]


def observations(suite: Suite, items: Sequence[Item]) -> list[Observation]:
    """What is one observation: a row, or all rows of a group."""
    if not isinstance(suite, InvarianceSuite):
        return [Observation(item.id, item.category, (place,)) for place, item in enumerate(items)]
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.group, []).append(place)
    return [Observation(group, items[found[0]].category, tuple(found)) for group, found in places.items()]


def scorer(suite: Suite, items: Sequence[Item], settings: EvaluateSettings, seed: int) -> Scorer:
    """What gives a model its numbers.

    Raises:
        ConfigError: A reward server's token is not in the environment.
    """
    match suite:
        case LikelihoodSuite():
            return partial(_likelihood, items, settings)
        case ChoiceSuite():
            return partial(_choice, suite, items, settings)
        case GenerationSuite():
            return partial(_generation, suite, items, settings, seed, _judge(suite.gold, suite.rules))
        case InstructionSuite():
            return partial(_instructions, suite, items, settings, seed)
        case InvarianceSuite():
            return partial(_invariance, suite, items, settings, seed, _judge(suite.gold, []))
        case DiversitySuite():
            return partial(_diversity, suite, items, settings, seed)
    raise TypeError(f"{type(suite).__name__} measures no model")


def margins(judge: Roles, items: Sequence[Item], settings: EvaluateSettings) -> Numbers:
    """By how much a reward model scores each row's best response higher than the best of the others."""
    found = _by_branch(judge, items, settings, lambda trees: scores(judge, REWARD, trees, settings.batch_tokens, PLAIN))
    return {place: first - max(others) for place, (first, *others) in found.items()}


def preferences(margin_of: Numbers) -> Scores:
    """Whether the best response is scored highest; a tie is not."""
    return Scores({place: float(margin > 0) for place, margin in margin_of.items()})


def longer_wins(items: Sequence[Item]) -> list[float]:
    """Whether each row's best response is the longest, in characters: what a judge of length alone would be right in; a
    tie is half right."""
    lengths = [[len(response) for response in item.row.responses] for item in items]  # type: ignore[union-attr]
    return [(np.sign(first - max(others)) + 1) / 2 for first, *others in lengths]


def _likelihood(items: Sequence[Item], settings: EvaluateSettings, contestant: Contestant) -> Scores:
    texts: Any = [item.row for item in items]
    with contestant.use() as language_model:
        found = text_likelihoods(language_model, texts, settings.max_length, settings.batch_tokens)
    return Scores(
        {place: each.bits / each.bytes for place, each in found.items()},
        weights={place: float(each.bytes) for place, each in found.items()},
        further={PERPLEXITY: perplexity(found.values())} if found else {},
    )


def _choice(suite: ChoiceSuite, items: Sequence[Item], settings: EvaluateSettings, contestant: Contestant) -> Scores:
    with contestant.use() as language_model:

        def likelihoods(trees: Any) -> dict[int, list[float]]:
            found = logprobs(language_model, trees, settings.batch_tokens, PLAIN)
            if not suite.normalised:
                return found
            return {
                tree.number: [
                    each / branch.reads for each, branch in zip(found[tree.number], tree.branches, strict=True)
                ]
                for tree in trees
            }

        found = _by_branch(contestant.roles, items, settings, likelihoods)
    return Scores({place: float(first > max(others)) for place, (first, *others) in found.items()})


def _by_branch(
    roles: Roles, items: Sequence[Item], settings: EvaluateSettings, numbers: Callable[[Any], dict[int, list[float]]]
) -> dict[int, list[float]]:
    """A number for each response of each row that fits, best response first, by the row's place."""
    template, longest = roles.base.template, roles.base.longest(settings.max_length)
    rows: Any = [item.row for item in items]
    trees, _ = usable(preference_tree(template, row, place, longest) for place, row in enumerate(rows))
    return numbers(trees)


Judge = Callable[[Sequence[Item], Sequence[str]], list[float]]
"""Takes items and a response to each; gives a number each."""


def _judge(gold: Gold, rules: Sequence[Rule]) -> Judge:
    if rules:
        mixture = RuleMixture(rules)
        return lambda items, texts: mixture.scores([item.row for item in items], texts)  # type: ignore[misc]
    return partial(_verdicts, gold)


def _verdicts(gold: Gold, items: Sequence[Item], texts: Sequence[str]) -> list[float]:
    rows: Any = [item.row for item in items]
    return [verdict(gold, row.facts, text, row.origin).correct for row, text in zip(rows, texts, strict=True)]


def _generation(
    suite: GenerationSuite,
    items: Sequence[Item],
    settings: EvaluateSettings,
    seed: int,
    judge: Judge,
    contestant: Contestant,
) -> Scores:
    by_temperature: dict[str, list[float]] = {}
    responses: list[list[str]] = [[] for _ in items]
    tokens = cut = 0
    for temperature in suite.temperatures:
        found = _responses(suite, items, settings, seed, contestant, temperature, suite.samples)
        texts, tokens, cut = found.texts, tokens + found.tokens, found.cut
        numbers = judge([item for item in items for _ in range(suite.samples)], texts)
        by_temperature[f"at {temperature:g}"] = np.reshape(numbers, (len(items), -1)).mean(1).tolist()
        for place, own in enumerate(responses):
            own += texts[place * suite.samples : (place + 1) * suite.samples]
    means = np.mean(list(by_temperature.values()), axis=0).tolist()
    several = by_temperature if len(by_temperature) > 1 else {}
    parts = {name: Part(dict(enumerate(each)), suite.part_yes_or_no) for name, each in several.items()}
    return Scores(dict(enumerate(means)), parts, responses=responses, tokens=tokens, cut=cut)


def _instructions(
    suite: InstructionSuite, items: Sequence[Item], settings: EvaluateSettings, seed: int, contestant: Contestant
) -> Scores:
    sampled = _responses(suite, items, settings, seed, contestant)
    facts: Any = [item.row.facts for item in items]  # type: ignore[union-attr]
    strict = [instructions.followed(own, text) for own, text in zip(facts, sampled.texts, strict=True)]
    loose = [instructions.followed(own, text, loose=True) for own, text in zip(facts, sampled.texts, strict=True)]
    parts = {
        "loose": _of_prompts(loose),
        "by-instruction": _of_instructions(strict),
        "by-instruction-loose": _of_instructions(loose),
    }
    families = [[kind.partition(":")[0] for kind, _ in instructions.instructions(own)] for own in facts]
    for family in sorted({family for names in families for family in names}):
        verdicts = [
            [verdict for name, verdict in zip(names, row, strict=True) if name == family]
            for names, row in zip(families, strict, strict=True)
        ]
        parts[family] = _of_instructions(verdicts)
    texts = [[text] for text in sampled.texts]
    return Scores(_of_prompts(strict).numbers, parts, responses=texts, tokens=sampled.tokens, cut=sampled.cut)


def _of_prompts(verdicts: Sequence[Sequence[bool]]) -> Part:
    """Whether all instructions of a prompt are followed."""
    return Part({place: float(all(row)) for place, row in enumerate(verdicts)}, yes_or_no=True)


def _of_instructions(verdicts: Sequence[Sequence[bool]]) -> Part:
    """The share of a prompt's instructions that are followed, weighted by their number."""
    counts = {place: float(len(row)) for place, row in enumerate(verdicts) if row}
    return Part({place: sum(verdicts[place]) / counts[place] for place in counts}, yes_or_no=False, weights=counts)


def _invariance(
    suite: InvarianceSuite,
    items: Sequence[Item],
    settings: EvaluateSettings,
    seed: int,
    judge: Judge,
    contestant: Contestant,
) -> Scores:
    found = _responses(suite, items, settings, seed, contestant)
    numbers = judge(items, found.texts)
    together = [each.places for each in observations(suite, items)]
    agreed = {place: float(len({numbers[each] for each in rows}) == 1) for place, rows in enumerate(together)}
    texts = [[found.texts[each] for each in rows] for rows in together]
    return Scores(agreed, responses=texts, tokens=found.tokens, cut=found.cut)


def _diversity(
    suite: DiversitySuite, items: Sequence[Item], settings: EvaluateSettings, seed: int, contestant: Contestant
) -> Scores:
    measure = diversity.distinct if suite.measure == "distinct" else diversity.dissimilarity
    found = _responses(suite, items, settings, seed, contestant, suite.temperature, suite.samples)
    together = [found.texts[start : start + suite.samples] for start in range(0, len(found.texts), suite.samples)]
    numbers = {place: measure(each, suite.n) for place, each in enumerate(together)}
    return Scores(numbers, responses=together, tokens=found.tokens, cut=found.cut)


def _responses(
    suite: SampledSuite,
    items: Sequence[Item],
    settings: EvaluateSettings,
    seed: int,
    contestant: Contestant,
    temperature: float = 0.0,
    samples: int = 1,
) -> Responses:
    rows: Any = [item.row for item in items]
    return respond(
        contestant,
        rows,
        Decoding(temperature=temperature),
        max_new_tokens=suite.max_new_tokens,
        seed=seed,
        per_prompt=samples,
        max_length=settings.max_length,
        tokens_per_batch=settings.batch_tokens,
    )
