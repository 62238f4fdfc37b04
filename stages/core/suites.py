"""The evaluation suites of a stage: which models got what, the figures of that, and the files that keep it.

`suites/NAME.jsonl` has an observation a line, with every model's number, so that any two models can be compared row by
row. A figure is called `suite.NAME`, by category `suite.NAME.CATEGORY`, and the gain over the parent on the same rows
like the figure, with `_gain` behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data import suite_rows
from data.suite_rows import Item
from pipeline.contract import Context
from pipeline.errors import ServerError
from pipeline.figures import CALIBRATION_ERROR, GAIN, LONGER_WINS, SUITE
from pipeline.manifest import DataCard, Metric
from pipeline.servers import placed
from pipeline.suites import GenerationSuite, PreferenceSuite, Suite
from reward import calibration
from reward.calibration import Bin
from reward.intervals import (
    mean_interval,
    paired_difference,
    proportion_difference,
    proportion_interval,
    ratio_interval,
)
from reward.mixture import RuleMixture
from stages.core import rows
from stages.core.comparison import Pair
from stages.core.lineup import Contestant
from stages.core.roles import Roles
from stages.core.suite_scores import (
    Observation,
    Part,
    Scorer,
    Scores,
    longer_wins,
    margins,
    observations,
    preferences,
    scorer,
)

Metrics = dict[str, Metric]
ROLE = "suites."


@dataclass
class _Ledger:
    """One suite: what it asks, and what each model got."""

    name: str
    suite: Suite
    items: Sequence[Item]
    observed: Sequence[Observation]
    scorer: Scorer | None
    """None where it is the reward model that is measured."""
    scores: dict[str, Scores] = field(default_factory=dict)
    calibration: dict[str, list[Bin]] = field(default_factory=dict)
    pairs: dict[str, dict[str, Pair]] = field(default_factory=dict)
    """Model -> figures of yes and no -> its numbers and its parent's, of the rows that fit both."""

    @property
    def figure(self) -> str:
        return f"{SUITE}{self.name}"

    def enter(self, model: str, parent: str | None, found: Scores) -> Metrics:
        """Keep what a model got; its figures, and their gains over its parent where that was entered before."""
        self.scores[model] = found
        self.pairs[model] = {}
        other = self.scores.get(parent) if parent else None
        before = {name: part.numbers for name, part in self._slices(other)} if other else {}
        metrics = {f"{self.figure}{ending}": metric for ending, metric in found.further.items()}
        for name, part in self._slices(found):
            if not part.numbers:
                continue
            metrics[name] = _mean(part)
            common = sorted(part.numbers.keys() & before.get(name, {}).keys())
            if not common:
                continue
            pair = [part.numbers[place] for place in common], [before[name][place] for place in common]
            weights = [part.weights[place] for place in common if part.weights]
            metrics[f"{name}{GAIN}"] = _gain(*pair, weights, yes_or_no=part.yes_or_no)
            if part.yes_or_no:
                self.pairs[model][name] = pair
        return metrics

    def _slices(self, scores: Scores) -> Iterator[tuple[str, Part]]:
        """Each figure with its numbers."""
        yield self.figure, Part(scores.numbers, self.suite.yes_or_no, scores.weights)
        for category in sorted({observation.category for observation in self.observed} - {""}):
            numbers = {
                place: number for place, number in scores.numbers.items() if self.observed[place].category == category
            }
            yield f"{self.figure}.{category}", Part(numbers, self.suite.yes_or_no, scores.weights)
        for name, part in scores.parts.items():
            yield f"{self.figure}.{name}", part

    def lines(self) -> Iterator[dict[str, Any]]:
        """An observation each, with every model's number and response."""
        for place, each in enumerate(self.observed):
            line: dict[str, Any] = {"id": each.id}
            if each.category:
                line["category"] = each.category
            line["scores"] = {
                model: found.numbers[place] for model, found in self.scores.items() if place in found.numbers
            }
            if weights := [found.weights[place] for found in self.scores.values() if place in found.weights]:
                line["weight"] = weights[0]
            if parts := self._parts(place):
                line["parts"] = parts
            said = {model: found.responses[place] for model, found in self.scores.items() if found.responses}
            if said and all(len(texts) == 1 for texts in said.values()):
                line["responses"] = {model: texts[0] for model, texts in said.items()}
            elif said:
                line["samples"] = {model: list(texts) for model, texts in said.items()}
            yield line

    def _parts(self, place: int) -> dict[str, dict[str, float]]:
        """One observation's other numbers, by model."""
        parts: dict[str, dict[str, float]] = {}
        for model, found in self.scores.items():
            for name, part in found.parts.items():
                if place in part.numbers:
                    parts.setdefault(name, {})[model] = part.numbers[place]
        return parts

    def record(self) -> dict[str, Any]:
        """What a reader of the figures needs to know."""
        curves = {model: [asdict(each) for each in curve] for model, curve in self.calibration.items()}
        suite = self.suite.model_dump(mode="json", include={"method", "measures"})
        figures = {"better": self.suite.BETTER, "share": self.suite.share, "observations": len(self.observed)}
        return {**suite, **figures, "calibration": curves}


class Suites:
    """The suites of an evaluation.

    Args:
        context: The stage's.

    Attributes:
        cards: What was read.
        tokens: Sampled so far.
        cut: Suite -> model -> prompts that lost their beginning.
        given_up: Suites whose reward server answered at first and failed later, by name, and how; they measure no
            further model.

    Raises:
        DataError: Rows of a suite cannot be used.
        ConfigError: A reward server's token is not in the environment.
    """

    def __init__(self, context: Context) -> None:
        self._settings = context.settings
        self._ledgers: list[_Ledger] = []
        self.cards: list[DataCard] = []
        self.tokens = 0
        self.cut: dict[str, dict[str, int]] = {}
        self.given_up: dict[str, str] = {}
        for role, suite in context.data.items():
            if isinstance(suite, Suite):
                read = suite_rows.read(suite)
                measured = (
                    None
                    if isinstance(suite, PreferenceSuite)
                    else scorer(suite, read.chosen, context.settings, context.seed)
                )
                observed = observations(suite, read.chosen)
                self._ledgers.append(_Ledger(role.removeprefix(ROLE), suite, read.chosen, observed, measured))
                self.cards.append(rows.card(context, role, read.record, len(read.chosen), rows.HELD_OUT))

    def try_out(self) -> None:
        """Have the rules of each suite judge a response, so that a server that cannot be asked shows before models do.

        Raises:
            ServerError: A reward server is out of reach or breaks the protocol.
        """
        for ledger in self._ledgers:
            if isinstance(ledger.suite, GenerationSuite) and ledger.suite.rules:
                first: Any = ledger.items[0].row
                with placed(f"{ROLE}{ledger.name}"):
                    RuleMixture(ledger.suite.rules).scores([first], ["Yes."])

    def measure(self, contestant: Contestant) -> Metrics:
        """A model's figures; parents come first."""
        found: Metrics = {}
        for ledger in self._ledgers:
            if ledger.scorer is None or ledger.name in self.given_up:
                continue
            try:
                scores = ledger.scorer(contestant)
            except ServerError as error:
                self.given_up[ledger.name] = error.in_a_line()
                continue
            self.tokens += scores.tokens
            if scores.cut:
                self.cut.setdefault(ledger.name, {})[contestant.name] = scores.cut
            found |= ledger.enter(contestant.name, contestant.parent, scores)
        return found

    def measure_judge(self, name: str, judge: Roles) -> Metrics:
        """A reward model's figures: how often it prefers the better response, how well its certainty is calibrated, and
        how often a judge of length alone would be right."""
        found: Metrics = {}
        for ledger in self._ledgers:
            if ledger.scorer:
                continue
            margin_of = margins(judge, ledger.items, self._settings)
            found |= ledger.enter(name, None, preferences(margin_of))
            if margin_of:
                certain = list(margin_of.values())
                ledger.calibration[name] = calibration.curve(certain)
                found[f"{ledger.figure}{CALIBRATION_ERROR}"] = calibration.expected_error(certain)
            found[f"{ledger.figure}{LONGER_WINS}"] = mean_interval(longer_wins(ledger.items))
        return found

    def pairs(self, model: str) -> dict[str, Pair]:
        """Of whole suites of yes and no: figure -> a measured model's numbers and its parent's."""
        return {name: pair for ledger, name, pair in self._tested(model) if name == ledger.figure}

    def parts(self, model: str) -> dict[str, Pair]:
        """The same of their categories, and of single conditions."""
        return {name: pair for ledger, name, pair in self._tested(model) if name != ledger.figure}

    def _tested(self, model: str) -> Iterator[tuple[_Ledger, str, Pair]]:
        for ledger in self._ledgers:
            for name, pair in ledger.pairs.get(model, {}).items():
                yield ledger, name, pair

    def write(self, directory: Path) -> None:
        """A file of each suite, with an observation a line."""
        for ledger in self._ledgers:
            path = directory / "suites" / f"{ledger.name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in ledger.lines())

    def record(self) -> Mapping[str, Any]:
        """What each suite measures and how, for the report."""
        return {ledger.name: ledger.record() for ledger in self._ledgers}


def _mean(part: Part) -> Metric:
    values = list(part.numbers.values())
    if part.weights:
        return _weighted(values, [part.weights[place] for place in part.numbers])
    if part.yes_or_no:
        return proportion_interval(sum(value == 1.0 for value in values), len(values))
    return mean_interval(values)


def _gain(own: Sequence[float], parent: Sequence[float], weights: Sequence[float], *, yes_or_no: bool) -> Metric:
    """The mean difference, weighted as the numbers are."""
    if weights:
        return _weighted([mine - theirs for mine, theirs in zip(own, parent, strict=True)], weights)
    return proportion_difference(own, parent) if yes_or_no else paired_difference(own, parent)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> Metric:
    return ratio_interval([value * weight for value, weight in zip(values, weights, strict=True)], weights)
