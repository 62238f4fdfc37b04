"""How numbers and text from models are written for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.findings import PROMPT_CUT
from pipeline.figures import LENGTH_CONTROLLED, SCORE, WIN_RATE
from pipeline.manifest import DataCard, Metric
from pipeline.report.inputs import AccuracyTest, Tally

LONGEST = 2_000
_BY_JUDGE = {WIN_RATE: "win rate by", LENGTH_CONTROLLED: "win rate at equal lengths by", SCORE: "score by"}
_SHARES = frozenset({"accuracy", "pair_accuracy", *(each.rstrip(".") for each in (WIN_RATE, LENGTH_CONTROLLED))})
_DECIMALS = {"perplexity": 2, "reward": 2, "kl": 2, "length": 1, "vocabulary": 0}


def excerpt(text: str) -> str:
    """The first 2,000 characters, saying so when there are more."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … (cut here; {len(text):,} characters in all)"


def label(metric: str) -> str:
    """A metric's name as a heading: `accuracy.sums` is `accuracy, sums`, `win_rate.gold` is `win rate by gold`."""
    for prefix, words in _BY_JUDGE.items():
        if metric.startswith(prefix):
            return f"{words} {metric.removeprefix(prefix)}"
    spelled = {
        **{"gold": "gold reward", "kl": "KL to reference", "reward": "learned reward"},
        "frontier_gap": "above best-of-n",
    }
    return spelled.get(metric, metric.replace(".", ", ").replace("_", " "))


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """A value of `metric`: shares in percent, the rest with the decimals that mean something."""
    sign = "+" if signed else ""
    if metric.split(".")[0] in _SHARES:
        written = f"{100 * value:{sign}.1f}%"
    else:
        written = f"{value:{sign},.{_DECIMALS.get(metric, 3)}f}"
    return _with_minus(written)


def brief(value: float, *, decimals: int | None = None) -> str:
    """Any quantity in three significant figures, or with so many decimals."""
    return _with_minus(f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}")


def chance(p: float) -> str:
    """A p-value, as far as it matters."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def significance(test: AccuracyTest | None) -> str:
    """The p-value of a test, and what is left of it after the correction; nothing without a test."""
    return f"p {chance(test.p)}, corrected {chance(test.adjusted)}" if test else ""


def interval(metric: str, measured: Metric, *, signed: bool = False) -> str:
    """`[low, high]`, or nothing when there is no interval."""
    if measured.low is None or measured.high is None:
        return ""
    low, high = (number(metric, bound, signed=signed) for bound in (measured.low, measured.high))
    return f"[{low}, {high}]"


def with_interval(metric: str, measured: Metric, *, signed: bool = False) -> str:
    """The value, followed by its interval when there is one."""
    value = number(metric, measured.value, signed=signed)
    return f"{value} {interval(metric, measured, signed=signed)}".strip()


def tally(counts: Tally) -> str:
    """How often a model won against its parent, and how often nobody can say."""
    written = f"{counts.won:,} won, {counts.tied:,} tied, {counts.lost:,} lost"
    return written + (f", {counts.unread:,} without a verdict" if counts.unread else "")


def found(check: Mapping[str, Any]) -> str:
    """What a requirement was held against, as `gate.Check.as_json` has it."""
    if check["figure"] is None:
        return "not measured"
    figure, compared = Metric.model_validate(check["figure"]), check["compared"]
    if compared == "ratio":
        return f"{with_interval('', figure)} times the parent's"
    written = with_interval(check["metric"], figure, signed=bool(compared))
    return f"{written} against the parent" if compared else written


def remarks(card: DataCard) -> list[str]:
    """What the doctor warned of in a data source, and what cutting and preparation did to it."""
    findings = card.diagnosis.get("findings", {})
    warned = [(kind, found["count"]) for kind, found in findings.items() if found["severity"] == "warning"]
    warned = [(kind, count) for kind, count in warned if kind != PROMPT_CUT.name]  # the card counts the training rows
    cut = [(PROMPT_CUT.name, card.cut)] if card.cut else []
    return [f"{what}: {count:,}" for what, count in [*warned, *cut, *card.prepared.items()]]


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def size(count: int) -> str:
    """Bytes in binary units."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def compact(value: Any) -> str:
    """A short value of any JSON type on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{key} {compact(each)}" for key, each in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(compact(each) for each in value)
    return str(value)


def _with_minus(written: str) -> str:
    return written.replace("-", "\N{MINUS SIGN}")
