"""Programmatic rewards: judges that need no model.

Four rules know what is correct, because the prompt's facts say so; the others measure the response alone. Every rule
is a pure function whose reward is in [0, 1].
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from data.ngrams import words
from data.normal_form import normal_form
from data.schema import Prompt
from data.world import gold_reward
from pipeline.errors import DataError
from reward.instructions import followed

SAID = "Yes."
"""A response for which every rule looks at all that it needs; for an empty one it might not."""
CLOSING = ".!?,;:"
QUOTES = "\"'`\u201c\u201d\u2018\u2019"
NUMBER = re.compile(
    r"""
    (?: (?<! [\w)] ) (?P<sign> [-\u2212] ) [$\u20ac\u00a3\u00a5]? )?+
    (?: (?P<whole> \d++ (?: ,\d++ )*+ ) (?P<part> \.\d++ )?+ | (?<! \d ) (?P<bare> \.\d++ ) )
    (?P<exponent> [eE][-+]?\d{1,3}+ (?! \d ) )?+
    """,
    re.VERBOSE,
)
"""A number as English writes it; `whole` may also be several numbers with nothing but commas between them."""
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{2,3})*+(?<=,\d{3})")
"""Digits in groups: 1,234,567 or, as in India, 12,34,567."""


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a response: its reward, and whether it is correct (1 or 0), both in [0, 1]."""

    reward: float
    correct: float


Judge = Callable[[Mapping[str, Any], str], Verdict]
"""Takes a prompt's facts and a response; raises `KeyError` with the name of a fact that is missing and `ValueError` for
one of no use."""


def world(facts: Mapping[str, Any], response: str) -> Verdict:
    """The embedded world's gold reward.

    Raises:
        ValueError: An answer, right or wrong, is no text.
    """
    wrong = facts.get("wrong", ())
    if not isinstance(wrong, list | tuple) or not all(isinstance(each, str) for each in (*wrong, facts["answer"])):
        raise ValueError("the prompt's `answer` is no text, or `wrong` no list of texts")
    gold = gold_reward(facts, response)
    return Verdict(gold.reward, gold.correct)


def exact(facts: Mapping[str, Any], response: str) -> Verdict:
    """Whether the response is the answer, but for case, spacing, quotation marks around it and punctuation at its end.

    Punctuation within counts, so that 3.14 is not 314 and -5 not 5.
    """
    return _right(_normalised(response) == _normalised(_answer(facts)))


def numeric(facts: Mapping[str, Any], response: str) -> Verdict:
    """Whether the last number of the response equals the last number of the answer, which may be a worked one that ends
    in `#### 42` (GSM8K, Cobbe et al. 2021, arXiv 2110.14168).

    Raises:
        ValueError: The answer holds no number.
    """
    answer = last_number(_answer(facts))
    if answer is None:
        raise ValueError("the prompt's `answer` holds no number")
    return _right(last_number(response) == answer)


def instructions(facts: Mapping[str, Any], response: str) -> Verdict:
    """The share of the prompt's instructions that the response follows; correct when it follows all of them.

    Raises:
        ValueError: The instructions are malformed.
    """
    verdicts = followed(facts, response)
    return Verdict(sum(verdicts) / len(verdicts), float(all(verdicts)))


JUDGES: dict[str, Judge] = {"world": world, "exact": exact, "numeric": numeric, "instructions": instructions}
"""The rules that know what is correct, by the names that the configuration uses."""
NEEDED = {
    "world": "of the embedded world",
    "exact": "with a column `answer`, or rows of question and answer",
    "numeric": "with a column `answer`, or rows of question and answer",
    "instructions": "with the columns `instruction_id_list` and `kwargs`, as in IFEval",
}
"""The prompts that each of them needs."""


def verdict(name: str, facts: Mapping[str, Any], response: str, origin: str) -> Verdict:
    """What one of `JUDGES` says of a response.

    Args:
        name: The rule's.
        facts: The prompt's.
        response: The text.
        origin: Where the prompt came from, for the error.

    Raises:
        DataError: The prompt's facts do not hold what the rule needs.
    """
    try:
        return JUDGES[name](facts, response)
    except KeyError as error:
        what = f"the prompt has no `{error.args[0]}`, which the rule `{name}` needs"
    except ValueError as error:
        what = f"{error}, which the rule `{name}` needs"
    raise DataError(what, where=origin, hint=f"give prompts {NEEDED[name]}, or take another rule (docs/rewards.md)")


def require_facts(names: Collection[str], prompt: Prompt) -> None:
    """See that a prompt holds what rules need, before any response is there.

    Args:
        names: Of any rules; only those of `JUDGES` need something.
        prompt: With its facts.

    Raises:
        DataError: It does not; names its origin.
    """
    for name in JUDGES:
        if name in names:
            verdict(name, prompt.facts, SAID, prompt.origin)


def pattern(response: str, expression: str) -> float:
    """1 when the regular expression is found anywhere in the response."""
    return float(re.search(expression, response) is not None)


def is_json(response: str) -> float:
    """1 when the whole response is one JSON value (RFC 8259), of any kind."""
    try:
        # Python's own reader refuses integers of thousands of digits, which are JSON.
        json.loads(response, parse_int=str, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def tagged(response: str, tags: Sequence[str]) -> float:
    """1 when the response is exactly the parts `<tag>...</tag>`, each once and in this order, with nothing but white
    space around them (as in DeepSeek-R1's format reward, arXiv 2501.12948, 2.2.2)."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if any(response.count(mark) != 1 for mark in marks):
        return 0.0
    rest = response
    for tag in tags:
        before, _, rest = rest.partition(f"<{tag}>")
        content, closed, rest = rest.partition(f"</{tag}>")
        if before.strip() or not closed or any(mark in content for mark in marks):
            return 0.0
    return float(not rest.strip())


def length(response: str, limit: int) -> float:
    """1 for up to `limit` words, falling linearly to 0 at twice as many."""
    return min(1.0, max(0.0, 2.0 - len(words(response)) / limit))


def repetition(response: str, n: int) -> float:
    """1 minus the share of runs of `n` words that occurred before in the response; 1 when it has none."""
    found = words(response)
    runs = [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exactly; None when there is none.

    Signs, decimals, exponents and commas between thousands are read, currency signs and full stops after a number are
    not part of it, and a minus between two numbers is no sign.
    """
    found = deque(NUMBER.finditer(text), maxlen=1)
    if not found:
        return None
    sign, whole, part, bare, exponent = (each or "" for each in found[0].groups())
    if "," in whole and not THOUSANDS.fullmatch(whole):
        sign, whole = "", whole.rpartition(",")[2]  # a list, of which this is the last
    digits = whole.replace(",", "") + part + bare + exponent
    return Decimal(f"-{digits}" if sign else digits)


def _right(correct: bool) -> Verdict:
    return Verdict(float(correct), float(correct))


def _answer(facts: Mapping[str, Any]) -> str:
    answer = facts["answer"]
    if not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError("the prompt's `answer` is no text or number")
    return str(answer)


def _normalised(text: str) -> str:
    folded = " ".join(normal_form(text, "NFKC").casefold().split())
    bare = folded.rstrip(CLOSING).strip(QUOTES).rstrip(CLOSING).strip()
    return bare or folded


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
