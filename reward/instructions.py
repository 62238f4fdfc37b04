"""Verifiable instructions: 25 kinds of constraints on a response that a program can check.

The kinds, the names of their arguments and the two ways to judge are those of IFEval (Zhou et al. 2023,
"Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911). A prompt carries two facts, as in the
published file of 541 prompts: `instruction_id_list`, the kinds, and `kwargs`, the arguments of each kind.

Strict judgement takes the response as it is. Loose judgement also tries it without its first line, without its last
line and without asterisks, and accepts an instruction that any of these variants follows.

Keywords match literally here; the published checkers read them as regular expressions. Kinds that the published
prompts never use (key sentences, rephrasing, constrained starts) are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, validate_call

Relation = Literal["less than", "at least"]
Count = Annotated[int, Field(ge=0)]
Phrase = Annotated[str, Field(min_length=1)]
Phrases = Annotated[list[Phrase], Field(min_length=1)]
Letter = Annotated[str, Field(min_length=1, max_length=1)]
Check = Callable[..., bool]
"""Takes a response that is not empty, and the arguments of its kind."""

ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""One of these occurs in a response that follows `detectable_format:constrained_response`."""
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
"""Markers that may be written with spaces within."""
FENCES = ("```json", "```Json", "```JSON", "```")


def followed(facts: Mapping[str, Any], response: str, *, loose: bool = False) -> list[bool]:
    """Whether a response follows each instruction of its prompt.

    Args:
        facts: The prompt's, with `instruction_id_list` and `kwargs`.
        response: The text; an empty one follows no instruction.
        loose: Accept what any variant of the response follows.

    Returns:
        A verdict per instruction.

    Raises:
        KeyError: A fact is missing; holds its name.
        ValueError: The facts are malformed, a kind is unknown, or its arguments are not those that it takes.
    """
    variants = [text for text in (_variants(response) if loose else [response]) if text.strip()]
    return [any(_check(kind, text, arguments) for text in variants) for kind, arguments in instructions(facts)]


def instructions(facts: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The kind and the arguments of each instruction of a prompt; arguments that are null do not count.

    Raises:
        KeyError: A fact is missing; holds its name.
        ValueError: The facts are malformed or a kind is unknown.
    """
    names, arguments = facts["instruction_id_list"], facts["kwargs"]
    if not isinstance(names, list | tuple) or not isinstance(arguments, list | tuple) or len(names) != len(arguments):
        raise ValueError("the prompt's `instruction_id_list` and `kwargs` are not two lists of the same length")
    if not names:
        raise ValueError("the prompt's `instruction_id_list` is empty")
    for name, values in zip(names, arguments, strict=True):
        if name not in CHECKS:
            raise ValueError(f"the prompt's `instruction_id_list` has {name!r}, which is no kind of instruction")
        if not isinstance(values, Mapping):
            raise ValueError(f"the prompt's `kwargs` has no mapping of arguments for {name!r}")
    return [
        (name, {argument: value for argument, value in values.items() if value is not None})
        for name, values in zip(names, arguments, strict=True)
    ]


def _check(kind: str, response: str, arguments: Mapping[str, Any]) -> bool:
    try:
        return CHECKS[kind](response, **arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"the prompt's `kwargs` for {kind!r}: {problem['loc'][-1]}: {problem['msg']}") from None


def _variants(response: str) -> Iterator[str]:
    lines = response.split("\n")
    cuts = (lines, lines[1:], lines[:-1], lines[1:-1])
    for cut, asterisks in product(cuts, (True, False)):
        text = response if cut is lines else "\n".join(cut).strip()
        yield text if asterisks else text.replace("*", "")


def _compares(number: int, relation: Relation, limit: int) -> bool:
    return number < limit if relation == "less than" else number >= limit


def _keywords(response: str, keywords: Phrases) -> bool:
    return all(keyword.lower() in response.lower() for keyword in keywords)


def _keyword_frequency(response: str, keyword: Phrase, frequency: Count, relation: Relation) -> bool:
    return _compares(response.lower().count(keyword.strip().lower()), relation, frequency)


def _forbidden_words(response: str, forbidden_words: Phrases) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(response: str, letter: Letter, let_frequency: Count, let_relation: Relation) -> bool:
    return _compares(response.lower().count(letter.lower()), let_relation, let_frequency)


def _language(response: str, language: Phrase) -> bool:
    return _detected_language(response) in (language, None)


def _sentences(response: str, num_sentences: Count, relation: Relation) -> bool:
    return _compares(len(_sentence_tokenizer().tokenize(response)), relation, num_sentences)


def _paragraphs(response: str, num_paragraphs: Count) -> bool:
    """Paragraphs stand between dividers of three asterisks; none but the first and the last part may be empty."""
    first, *others = re.split(r"\s?\*\*\*\s?", response)
    inner, last = others[:-1], others[-1:]
    if not all(part.strip() for part in inner):
        return False
    return sum(bool(part.strip()) for part in (first, *inner, *last)) == num_paragraphs


def _words(response: str, num_words: Count, relation: Relation) -> bool:
    return _compares(len(re.findall(r"\w+", response)), relation, num_words)


def _paragraph_first_word(response: str, num_paragraphs: Count, nth_paragraph: Count, first_word: Phrase) -> bool:
    """Paragraphs stand between empty lines. An empty paragraph does not count, but keeps its place."""
    paragraphs = response.split("\n\n")
    filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if not 0 < nth_paragraph <= filled or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return filled == num_paragraphs and re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


def _placeholders(response: str, num_placeholders: Count) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def _postscript(response: str, postscript_marker: Phrase) -> bool:
    marker = POSTSCRIPTS.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(marker, response.lower()) is not None


def _bullets(response: str, num_bullets: Count) -> bool:
    starred = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    dashed = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(starred) + len(dashed) == num_bullets


def _constrained_response(response: str) -> bool:
    return any(answer in response for answer in ANSWERS)


def _highlights(response: str, num_highlights: Count) -> bool:
    """Parts between asterisks. One between two on either side counts twice if it also matches between single ones, as
    published."""
    single = re.findall(r"\*[^\n\*]*\*", response)
    double = re.findall(r"\*\*[^\n\*]*\*\*", response)
    return sum(bool(part.strip("*").strip()) for part in (*single, *double)) >= num_highlights


def _sections(response: str, section_spliter: Phrase, num_sections: Count) -> bool:
    marks = re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", response)
    return len(marks) >= num_sections


def _json(response: str) -> bool:
    text = response.strip()
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(response: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", response))


def _two_responses(response: str) -> bool:
    parts = response.split("******")
    if not all(part.strip() for part in parts[1:-1]):
        return False
    responses = [part.strip() for part in parts if part.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def _repeats_prompt(response: str, prompt_to_repeat: Phrase) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(response: str, end_phrase: Phrase) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(response: str, capital_frequency: Count, capital_relation: Relation) -> bool:
    sentences = _sentence_tokenizer().tokenize(response)
    words = [word for sentence in sentences for word in _word_tokenizer().tokenize(sentence)]
    return _compares(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _english_capital(response: str) -> bool:
    return response.isupper() and _language(response, "en")


def _english_lowercase(response: str) -> bool:
    return response.islower() and _language(response, "en")


def _no_comma(response: str) -> bool:
    return "," not in response


def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _detected_language(text: str) -> str | None:
    """The code of the language (ISO 639-1); None for a text without letters."""
    from langdetect.lang_detect_exception import LangDetectException

    detector = _language_detectors().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


@cache
def _language_detectors() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    detectors = DetectorFactory()
    # The detector draws random numbers; with a seed the same text has the same language every time.
    detectors.set_seed(0)
    detectors.load_profile(PROFILES_DIRECTORY)
    return detectors


@cache
def _sentence_tokenizer() -> Any:
    import punkt

    return punkt.PunktSentenceTokenizer(punkt.load_model("english"))


@cache
def _word_tokenizer() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


_CHECKS: dict[str, Check] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _paragraph_first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
CHECKS: dict[str, Check] = {kind: validate_call(check) for kind, check in _CHECKS.items()}
"""Kind of instruction -> its check, which raises ValidationError for arguments that it does not take."""
