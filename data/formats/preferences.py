"""Layouts of a prompt and several responses, best first: pairs, ranked lists, responses with scores, and answers to
choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.findings import (
    EMPTY_RESPONSE,
    EQUAL_RESPONSES,
    NO_HUMAN_TURN,
    SCORES_CONTRADICT,
    TIE,
    TOO_MANY_RESPONSES,
    BadRow,
    shown,
)
from data.formats import hh
from data.formats.layout import Format, Record
from data.formats.messages import SHAREGPT, Turns, is_pair_of_turns, listed, message
from data.formats.singles import ID, ID_AND_SYSTEM, SCORES_OF_PAIR, instructed
from data.formats.turns import (
    dialogue,
    ending_with,
    in_order,
    prompt,
    response,
    same_before_last,
    spoken,
    with_system,
)
from data.formats.values import number, sequence, text, wrong
from data.schema import Preference

PAIR = frozenset({"chosen", "rejected"})
MARGIN = frozenset({"margin"})
TEXT_OF_RESPONSE = ("text", "content", "response")
MOST_RESPONSES = 1000


@dataclass(frozen=True)
class _Scored:
    """A response, its place in the record and its score."""

    place: str
    response: str
    score: float


def _explicit(record: Record, origin: str) -> Preference:
    asked = prompt(record, "prompt", origin)
    return _compared(asked, _pair(record, asked, origin), _margin(record, origin), origin)


def _pair(record: Record, asked: Turns, origin: str) -> dict[str, str]:
    chosen, rejected = record["chosen"], record["rejected"]
    responses = {name: response(record[name], asked, name, origin) for name in ("chosen", "rejected")}
    if isinstance(chosen, str) != isinstance(rejected, str):
        expected = "text, as `chosen` is" if isinstance(chosen, str) else "messages, as `chosen` is"
        raise wrong("rejected", expected, rejected, origin)
    return responses


def _ultrafeedback(record: Record, origin: str) -> Preference:
    asked = prompt(record, "prompt", origin)
    responses = _pair(record, asked, origin)
    chosen, rejected = (number(record[name], name, origin) for name in ("score_chosen", "score_rejected"))
    if chosen == rejected:
        raise BadRow(TIE, f"score_chosen and score_rejected: {chosen:g}", where=origin)
    if chosen < rejected:
        what = f"score_chosen: {chosen:g}, score_rejected: {rejected:g}"
        raise BadRow(SCORES_CONTRADICT, what, where=origin)
    return _compared(asked, responses, chosen - rejected, origin)


def _implicit(record: Record, origin: str) -> Preference:
    chosen, rejected = (dialogue(record[name], name, origin) for name in ("chosen", "rejected"))
    same_before_last(chosen, rejected, origin)
    asked, responses = _parted(chosen, rejected)
    return _compared(with_system(record, asked, origin), responses, _margin(record, origin), origin)


def _hh(record: Record, origin: str) -> Preference:
    chosen, rejected = (_hh_turns(record[name], name, origin) for name in ("chosen", "rejected"))
    same_before_last(chosen, rejected, origin)
    roles = [each.role for each in chosen.values()]
    if roles[-2:-1] != ["user"]:
        raise BadRow(NO_HUMAN_TURN, f"chosen: {shown(record['chosen'])}", where=origin)
    asked, responses = _parted(chosen, rejected)
    return _compared(asked, responses, _margin(record, origin), origin)


def _hh_turns(value: object, field: str, origin: str) -> Turns:
    return ending_with("assistant", spoken(text(value, field, origin), field, origin), origin)


def _parted(chosen: Turns, rejected: Turns) -> tuple[Turns, dict[str, str]]:
    """Prompt and responses of two dialogues, parted at the last turn: what both responses begin with stays in them."""
    *before, last = chosen
    other = next(reversed(rejected))
    responses = {last: chosen[last].content, other: rejected[other].content}
    return {place: chosen[place] for place in before}, responses


def _sharegpt(record: Record, origin: str) -> Preference:
    turns = in_order(listed(record["conversations"], "conversations", origin, SHAREGPT), origin)
    asked = with_system(record, ending_with("user", turns, origin), origin)
    answers = {name: message(record[name], name, origin, SHAREGPT) for name in ("chosen", "rejected")}
    for name, answer in answers.items():
        ending_with("assistant", {name: answer}, origin)
    responses = {name: answer.content for name, answer in answers.items()}
    return _compared(asked, responses, _margin(record, origin), origin)


def _alpaca(record: Record, origin: str) -> Preference:
    asked = instructed(record, origin)
    responses = {name: text(record[name], name, origin) for name in ("chosen", "rejected")}
    return _compared(asked, responses, _margin(record, origin), origin)


def _ranked(record: Record, origin: str) -> Preference:
    values = _several(record["responses"], "responses", "a list of at least two responses, best first", origin)
    asked = prompt(record, "prompt", origin)
    places = [f"responses[{index}]" for index in range(len(values))]
    responses = {place: response(each, asked, place, origin) for place, each in zip(places, values, strict=True)}
    return _compared(asked, responses, _margin(record, origin), origin)


def _scored(record: Record, origin: str) -> Preference:
    asked = prompt(record, "prompt", origin)
    scored = sorted(_with_scores(record, asked, origin), key=lambda each: -each.score)
    best = {each.score: each for each in reversed(scored)}  # the first of each score stays
    kept = [each for each in scored if best[each.score] is each]
    if len(kept) < 2:
        raise BadRow(TIE, f"scores: {scored[0].score:g} for all {len(scored)} responses", where=origin)
    responses = {each.place: each.response for each in kept}
    return _compared(asked, responses, kept[0].score - kept[-1].score, origin)


def _with_scores(record: Record, asked: Turns, origin: str) -> list[_Scored]:
    values = _several(record["responses"], "responses", "a list of at least two responses", origin)
    if "scores" not in record:
        return [_scored_object(each, f"responses[{index}]", origin) for index, each in enumerate(values)]
    expected = f"{len(values)} numbers, one for each response"
    scores = sequence(record["scores"], "scores", expected, origin)
    if len(scores) != len(values):
        raise wrong("scores", expected, record["scores"], origin)
    return [
        _Scored(place, response(value, asked, place, origin), number(score, f"scores[{index}]", origin))
        for index, (value, score) in enumerate(zip(values, scores, strict=True))
        for place in (f"responses[{index}]",)
    ]


def _scored_object(value: object, place: str, origin: str) -> _Scored:
    names = [name for name in TEXT_OF_RESPONSE if isinstance(value, Mapping) and name in value]
    if not isinstance(value, Mapping) or len(names) != 1:
        raise wrong(place, f"an object with `score` and one of {', '.join(TEXT_OF_RESPONSE)}", value, origin)
    content = text(value[names[0]], f"{place}.{names[0]}", origin)
    return _Scored(place, content, number(value.get("score"), f"{place}.score", origin))


def _choices(record: Record, origin: str) -> Preference:
    expected = "a list of at least two answers to choose from"
    values = _several(record["choices"], "choices", expected, origin)
    asked = prompt(record, "prompt", origin)
    responses = {f"choices[{index}]": text(each, f"choices[{index}]", origin) for index, each in enumerate(values)}
    right = _right_choice(record["answer"], values, origin)
    best_first = dict(sorted(responses.items(), key=lambda each: each[0] != f"choices[{right}]"))
    return _compared(asked, best_first, 0.0, origin)


def _right_choice(answer: object, choices: Sequence[object], origin: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise wrong("answer", f"one of the choices, or its place from 0 to {len(choices) - 1}", answer, origin)


def _has_scores(record: Record) -> bool:
    responses = record["responses"]
    first = responses[0] if isinstance(responses, list | tuple) and responses else None
    return "scores" in record or (isinstance(first, Mapping) and "score" in first)


def _several(value: object, field: str, expected: str, origin: str) -> Sequence[object]:
    values = sequence(value, field, expected, origin)
    if len(values) < 2:
        raise wrong(field, expected, value, origin)
    if len(values) > MOST_RESPONSES:
        what = f"{field}: {len(values):,} (at most {MOST_RESPONSES:,})"
        raise BadRow(TOO_MANY_RESPONSES, what, where=origin)
    return values


def _margin(record: Record, origin: str) -> float:
    """The column `margin`; 0 when it is not known."""
    value = record.get("margin")
    if value is None or value == "":
        return 0.0
    margin = number(value, "margin", origin)
    if margin < 0:
        raise BadRow(SCORES_CONTRADICT, f"margin: {margin:g}", where=origin)
    return margin


def _compared(asked: Turns, responses: Mapping[str, str], margin: float, origin: str) -> Preference:
    """A comparison that teaches something.

    Args:
        asked: The prompt; it may be empty.
        responses: Place in the record -> response, best first.
        margin: By how much the first beats the last; 0 when it is not known.
        origin: Where the record is.
    """
    for place, content in responses.items():
        if not content.strip():
            raise BadRow(EMPTY_RESPONSE, f"{place}: {shown(content)} (empty)", where=origin)
    first: dict[str, str] = {}
    for place, content in responses.items():
        other = first.setdefault(content.strip(), place)
        if other != place:
            raise BadRow(EQUAL_RESPONSES, f"{other} and {place}: {shown(responses[other])}", where=origin)
    return Preference(tuple(asked.values()), tuple(responses.values()), margin, origin)


PREFERENCES: tuple[Format, ...] = (
    Format(
        "explicit",
        "preference",
        PAIR | {"prompt"},
        _explicit,
        fits=lambda record: not record.keys() >= SCORES_OF_PAIR,
        optional=ID_AND_SYSTEM | MARGIN,
        numbers=MARGIN,
    ),
    Format(
        "implicit",
        "preference",
        PAIR,
        _implicit,
        fits=lambda record: "prompt" not in record and isinstance(record["chosen"], list | tuple),
        optional=ID_AND_SYSTEM | MARGIN,
        numbers=MARGIN,
    ),
    Format(
        "hh",
        "preference",
        PAIR,
        _hh,
        fits=lambda record: "prompt" not in record and hh.is_dialogue(record["chosen"]),
        optional=ID | MARGIN,
        numbers=MARGIN,
    ),
    Format(
        "ultrafeedback",
        "preference",
        PAIR | SCORES_OF_PAIR | {"prompt"},
        _ultrafeedback,
        optional=ID_AND_SYSTEM | {"prompt_id", "messages"},
        numbers=SCORES_OF_PAIR,
    ),
    Format(
        "sharegpt_preference",
        "preference",
        PAIR | {"conversations"},
        _sharegpt,
        fits=is_pair_of_turns,
        optional=ID_AND_SYSTEM | MARGIN,
        numbers=MARGIN,
    ),
    Format(
        "alpaca_preference",
        "preference",
        PAIR | {"instruction"},
        _alpaca,
        fits=lambda record: isinstance(record["chosen"], str),
        optional=ID_AND_SYSTEM | MARGIN | {"input", "history"},
        numbers=MARGIN,
    ),
    Format(
        "ranked",
        "preference",
        frozenset({"prompt", "responses"}),
        _ranked,
        fits=lambda record: not _has_scores(record),
        optional=ID_AND_SYSTEM | MARGIN,
        numbers=MARGIN,
    ),
    Format(
        "scored",
        "preference",
        frozenset({"prompt", "responses"}),
        _scored,
        fits=_has_scores,
        optional=ID_AND_SYSTEM | {"scores"},
        numbers=frozenset({"scores"}),
    ),
    Format(
        "choices",
        "preference",
        frozenset({"prompt", "choices", "answer"}),
        _choices,
        optional=ID_AND_SYSTEM,
    ),
)
"""Formats of rows with several responses."""
