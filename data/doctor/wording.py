"""A diagnosis as people read it in a terminal. Whatever comes from data is escaped and cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from data.doctor.content import fields
from data.doctor.diagnosis import Diagnosis
from data.findings import Finding, Severity
from pipeline.terminal import printable, table

LONGEST = 160
ENDS_SHOWN = 5
"""Fields of the first row that are shown from each end, where it has many."""

_COUNTED: tuple[Severity, ...] = ("error", "warning")


def describe(diagnosis: Diagnosis) -> str:
    """The decision, one example, counts, findings from the gravest on, figures, and the verdict."""
    blocks = [_decision(diagnosis), _example(diagnosis), _counts(diagnosis)]
    blocks += ["\n".join(_finding(found)) for found in diagnosis.findings]
    blocks += [_figures(diagnosis.figures), _lengths(diagnosis.lengths), _verdict(diagnosis)]
    return "\n\n".join(filter(None, blocks))


def _decision(diagnosis: Diagnosis) -> str:
    source = printable(diagnosis.source or "data", LONGEST)
    if not diagnosis.kind:
        return f"{source}: no row could be read"
    by = f" by its columns {printable(', '.join(diagnosis.columns))}" if diagnosis.columns else ""
    return f"{source}: read as `{printable(diagnosis.format)}` ({diagnosis.kind}){by}"


def _example(diagnosis: Diagnosis) -> str:
    if diagnosis.example is None:
        return ""
    named = fields(diagnosis.example)
    width = max(len(name) for name, _ in named)
    lines = [f"  {name:<{width}}  {printable(text, LONGEST)}" for name, text in named]
    if len(lines) > 2 * ENDS_SHOWN:
        left_out = f"  ... {len(lines) - 2 * ENDS_SHOWN:,} more ..."
        lines = [*lines[:ENDS_SHOWN], left_out, *lines[-ENDS_SHOWN:]]
    return "\n".join([f"first row, {_place(diagnosis.example.origin)}", *lines])


def _counts(diagnosis: Diagnosis) -> str:
    training = diagnosis.usable - diagnosis.held_out
    lines = [
        f"{_counted(diagnosis.rows, 'row')}, {diagnosis.usable:,} usable: "
        f"{training:,} to train on, {diagnosis.held_out:,} held out"
    ]
    if diagnosis.scripts:
        scripts = ", ".join(f"{script} {rows:,}" for script, rows in diagnosis.scripts.items())
        lines.append(f"rows by script: {printable(scripts, LONGEST)}")
    return "\n".join(lines)


def _finding(found: Finding) -> Iterator[str]:
    yield f"{found.kind.severity}: {found.kind.name}: {found.count:,}"
    for where, what in found.examples:
        particulars = f": {printable(what, LONGEST)}" if what else ""
        yield f"  {_place(where)}{particulars}"
    yield f"  fix: {found.kind.fix}"


def _place(where: str) -> str:
    """A place cut at its beginning, because the line is at its end."""
    shown = printable(where, None)
    return shown if len(shown) <= LONGEST else f"...{shown[3 - LONGEST :]}"


def _figures(figures: Mapping[str, float]) -> str:
    lines = []
    if "longer_wins" in figures:
        low, high = figures["longer_wins_low"], figures["longer_wins_high"]
        lines.append(
            f"the better response is {figures['chosen_longer_mean']:+.1f} characters longer on average "
            f"({figures['chosen_longer_median']:+.1f} in the median); always preferring the longer one is right in "
            f"{figures['longer_wins']:.1%} of the pairs [{low:.1%}, {high:.1%}]"
        )
    if "over_long_share" in figures:
        lines.append(f"{figures['over_long_share']:.1%} of the rows are longer than max_length")
    if "suggested_max_length" in figures:
        lines.append(f"max_length: {figures['suggested_max_length']:.0f} leaves 99.5% of the rows whole")
    return "\n".join(lines)


def _lengths(lengths: Mapping[str, Mapping[str, int]]) -> str:
    if not lengths:
        return ""
    headings = ["tokens", *next(iter(lengths.values()))]
    return table(headings, ([part, *(f"{value:,}" for value in found.values())] for part, found in lengths.items()))


def _verdict(diagnosis: Diagnosis) -> str:
    errors, warnings = (sum(diagnosis.findings.counts(severity).values()) for severity in _COUNTED)
    if errors:
        return f"not fit for training: {_counted(errors, 'error')}, {_counted(warnings, 'warning')}"
    if not diagnosis.usable:
        return "not fit for training: no usable row"
    return f"fit for training, with {_counted(warnings, 'warning')}" if warnings else "fit for training"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
