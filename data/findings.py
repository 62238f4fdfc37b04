"""What can be wrong with data: every kind of finding, how grave it is, and how to mend it.

An `error` stops a stage unless the source says `on_bad_row: skip`; a `dropped` row is well-formed but nothing can
be learnt from it, so it is left out and counted; a `warning` is trained on; a `note` is only worth knowing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.errors import DataError
from pipeline.terminal import printable

Severity = Literal["error", "dropped", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "dropped", "warning", "note")
EXAMPLES_KEPT = 5


@dataclass(frozen=True)
class Kind:
    """One kind of finding."""

    name: str
    """What is counted under; for example `empty response`."""
    severity: Severity
    fix: str
    """What a user can do about it."""


class BadRow(DataError):
    """A row that cannot be used; what its kind says happens to it.

    Args:
        kind: Why.
        what: The field and its value, as in `chosen: null (expected text)`; the kind's name when empty.
        where: `file:line`.
        hint: How to mend it, when the kind's own remedy is too general.
    """

    def __init__(self, kind: Kind, what: str = "", *, where: str, hint: str = "") -> None:
        self.kind = kind
        super().__init__(what or kind.name, where=where, hint=hint or kind.fix)


@dataclass
class Finding:
    """How often a kind was found, and where first."""

    kind: Kind
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    """Place and particulars of the first few."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        examples = [{"where": where, "what": what} for where, what in self.examples]
        return {"severity": self.kind.severity, "count": self.count, "fix": self.kind.fix, "examples": examples}


class Findings:
    """Findings of one data source, gravest kinds first."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}

    def add(self, kind: Kind, where: str = "", what: str = "", count: int = 1) -> None:
        """Count a finding and keep its place if it is among the first."""
        found = self._found.setdefault(kind.name, Finding(kind))
        found.count += count
        if where and len(found.examples) < EXAMPLES_KEPT:
            found.examples.append((where, what))

    def add_row(self, problem: BadRow) -> None:
        """Count a row that cannot be used; a remedy of its own is kept with the place."""
        remedy = "" if problem.hint == problem.kind.fix else f"; {problem.hint}"
        self.add(problem.kind, problem.where, problem.what + remedy)

    def __iter__(self) -> Iterator[Finding]:
        return iter(sorted(self._found.values(), key=lambda found: SEVERITIES.index(found.kind.severity)))

    def __getitem__(self, kind: Kind) -> Finding:
        """The finding of a kind, empty if there was none."""
        return self._found.get(kind.name, Finding(kind))

    def counts(self, *severities: Severity) -> dict[str, int]:
        """Kind -> count, in alphabetical order; of all severities when none is named."""
        wanted = severities or SEVERITIES
        kept = sorted(found.kind.name for found in self if found.kind.severity in wanted)
        return {name: self._found[name].count for name in kept}

    def record(self) -> dict[str, Any]:
        """As JSON: kind -> finding."""
        return {found.kind.name: found.record() for found in self}


def shown(value: object) -> str:
    """A value from a file as it may be printed: escaped, at most 80 characters."""
    return "null" if value is None else cut(repr(value))


def cut(text: str) -> str:
    """At most 80 characters of a text, control characters shown as escapes."""
    return printable(text)


# What is wrong with a file or a line.
NOT_UTF8 = Kind("not UTF-8", "error", "convert the file to UTF-8")
CUT_SHORT = Kind("cut short", "error", "the file ends inside a row: is the download complete?")
BROKEN_JSON = Kind("broken JSON", "error", "correct this line")
NOT_AN_OBJECT = Kind("not an object", "error", "write one JSON object per row")
DUPLICATE_KEY = Kind("duplicate key", "error", "keep one of the two")
NOT_FINITE = Kind("number that is not finite", "error", "write a number, or leave the field out")
HUGE_NUMBER = Kind("number too large", "error", "write it as text, or as a smaller number")
RAGGED = Kind(
    "ragged row", "error", "give every row as many fields as the header, and quote fields that hold separators"
)
UNCLOSED_QUOTE = Kind("unclosed quote", "error", "close the quote; a quote inside a field is written twice")
TOO_LARGE = Kind("row too large", "error", "split the row, or raise max_chars")
BYTE_ORDER_MARK = Kind("byte order mark", "note", "nothing to do: it is skipped")
OTHER_SEPARATOR = Kind("other separator", "note", "nothing to do: it was recognised")
NO_CHECKSUMS = Kind("no page checksums", "note", "write the file with page checksums, so that damage is noticed")

# What is wrong with a row.
MISSING_COLUMN = Kind("missing column", "error", "every row needs the columns of the first one")
WRONG_TYPE = Kind("wrong type", "error", "correct this row")
MIXED_LAYOUT = Kind("mixed layouts", "error", "write all rows in one layout")
NUL = Kind("NUL character", "error", "remove the character")
SURROGATE = Kind("lone surrogate", "error", "remove it or write the whole character")
UNKNOWN_ROLE = Kind("unknown role", "error", "use system, user and assistant")
ROLE_ORDER = Kind("turns out of order", "error", "correct the order of the turns")
NO_ASSISTANT_TURN = Kind("no assistant turn", "error", "add the answer, or use the row as a prompt")
TOO_MANY_RESPONSES = Kind("too many responses", "error", "keep at most 1,000 responses to a prompt")
ADAPTER_FAILED = Kind("adapter failed", "error", "correct the function, or the row")
TEMPLATE_REFUSES = Kind("refused by the chat template", "error", "leave such rows out, or set another chat template")
UNUSED_COLUMN = Kind("unused column", "warning", "nothing reads it: remove it, or map it with `columns`")

# Rows that nothing can be learnt from.
EMPTY_TEXT = Kind("empty text", "dropped", "leave such rows out")
EMPTY_PROMPT = Kind("empty prompt", "dropped", "leave such rows out")
EMPTY_RESPONSE = Kind("empty response", "dropped", "leave such rows out")
EQUAL_RESPONSES = Kind("equal responses", "dropped", "leave such pairs out")
DIALOGUES_DIFFER = Kind(
    "dialogues differ before the last turn", "dropped", "give both dialogues the same turns but the last"
)
NO_HUMAN_TURN = Kind("no human turn before the last assistant turn", "dropped", "give the turn that is answered")
TIE = Kind("tie", "dropped", "leave such pairs out")
SCORES_CONTRADICT = Kind("rejected scores higher than chosen", "dropped", "swap the two, or correct the scores")
THUMBS_DOWN = Kind("thumbs down", "dropped", "such a response is not imitated; nothing to do")
LEFT_OUT_BY_ADAPTER = Kind("left out by the adapter", "dropped", "the function returned None")
NOTHING_TRAINED = Kind("no trained token", "dropped", "give rows with an answer")
TOO_LONG = Kind("trained part longer than max_length", "dropped", "raise max_length, or shorten the responses")
TOO_FEW_RESPONSES = Kind("fewer than three responses", "dropped", "give rankings of three or more")
EQUAL_TOKENS = Kind("responses equal after tokenising", "dropped", "leave such pairs out")
EQUAL_WITHIN_LENGTH = Kind("responses differ only past max_length", "dropped", "raise max_length")

# Text that preparation leaves out.
TOO_FEW_WORDS = Kind("fewer words than min_words", "dropped", "nothing to do, or lower min_words")
REPETITIVE = Kind("repetitive text", "dropped", "nothing to do, or raise repetition")
CONTAMINATED = Kind("held-out words in the text", "dropped", "nothing to do: it would spoil the evaluation")
DUPLICATE_TEXT = Kind("duplicate text", "dropped", "nothing to do: one copy is trained on")
SIMILAR_TEXT = Kind("near-duplicate text", "dropped", "nothing to do, or raise similarity")

# Rows that are trained on, though something is odd.
PROMPT_CUT = Kind("prompt cut to fit", "warning", "raise max_length, or shorten the prompts")
NO_PROMPT = Kind("preference without a prompt", "warning", "give the question that was answered")
EQUAL_BUT_FOR_CASE = Kind("responses equal but for case", "warning", "leave such pairs out")
CONTROL_CHARACTERS = Kind("control characters", "warning", "remove them")
INVISIBLE_CHARACTERS = Kind("invisible or direction-changing characters", "warning", "remove them")
REPLACEMENT_CHARACTERS = Kind("replacement characters", "warning", "decode the source again: bytes were lost")
CONTROL_TOKENS = Kind(
    "control tokens in content", "warning", "nothing to do: they are encoded as text; remove them if pasted"
)
TEMPLATE_SYNTAX = Kind("template syntax in content", "note", "nothing to do: it stays text")
NULL_WORDS = Kind("null written as text", "warning", "leave such rows out, or write what was meant")
NUMBER_AS_TEXT = Kind("number written as text", "warning", "write numbers as numbers")
DUPLICATE_ID = Kind("duplicate id", "warning", "give every row an id of its own")
DUPLICATE_ROW = Kind("duplicate row", "warning", "keep one of them")
CONTRADICTION = Kind("contradictory pairs", "warning", "keep one direction, or neither")
CYCLE = Kind("preferences in a cycle", "warning", "drop one of the pairs of the cycle")
LONGER_WINS = Kind("length bias", "warning", "balance lengths: a reward model can win by counting tokens")

# Data that is on both sides.
LEAK_EXACT = Kind("prompt on both sides", "error", "drop it from one side")
LEAK_NORMALISED = Kind("prompt on both sides but for case and punctuation", "warning", "drop it from one side")
LEAK_NGRAMS = Kind("13 words in a row on both sides", "warning", "look at the examples; drop copies from one side")
