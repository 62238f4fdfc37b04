"""What the doctor finds in files, and where it says that it found it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from data.doctor import Diagnosis, Examination, describe
from data.findings import (
    CONTRADICTION,
    CONTROL_CHARACTERS,
    CONTROL_TOKENS,
    CYCLE,
    DIALOGUES_DIFFER,
    DUPLICATE_ID,
    DUPLICATE_ROW,
    EQUAL_BUT_FOR_CASE,
    EQUAL_RESPONSES,
    INVISIBLE_CHARACTERS,
    LEAK_EXACT,
    LEAK_NGRAMS,
    LEAK_NORMALISED,
    LONGER_WINS,
    NO_PROMPT,
    NULL_WORDS,
    NUMBER_AS_TEXT,
    REPLACEMENT_CHARACTERS,
    TEMPLATE_SYNTAX,
    UNUSED_COLUMN,
    WRONG_TYPE,
    Findings,
    Kind,
)
from data.read import scan
from data.schema import Message
from data.split import bucket
from pipeline.config import DataSource

DATA = Path(os.environ.get("BATON_DATA", REPOSITORY.parent / "shared" / "data"))
HH = DATA / "hh-rlhf"

Record = dict[str, Any]


def write(path: Path, records: Iterable[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def examined(path: Path, *others: Path, held_out: float = 0.0, **options: Any) -> Diagnosis:
    """The diagnosis of a file, against all of some others."""
    examination = Examination(str(path), held_out=held_out, **options)
    for reading in scan(DataSource(source=str(path)), examination.findings):
        examination.see(reading)
    for other in others:
        examination.against(scan(DataSource(source=str(other)), Findings()), other.name)
    return examination.diagnose()


def pair(prompt: Any, chosen: Any, rejected: Any, **others: Any) -> Record:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


def pairs(count: int) -> list[Record]:
    """Sound pairs: the longer response is as often the better one."""
    responses = [("a good answer", "no"), ("yes", "a bad answer")]
    return [pair(f"question {n}", *(f"{text} {n}" for text in responses[n % 2])) for n in range(count)]


def places(diagnosis: Diagnosis, kind: Kind) -> list[str]:
    """Where a kind was found, in the words of the report."""
    return [f"{where}: {what}" if what else where for where, what in diagnosis.findings[kind].examples]


def on_side(held_out: bool, share: float, texts: Iterable[str]) -> str:
    """The first text whose prompt falls on a side."""
    return next(text for text in texts if (bucket([Message("user", text)]) < share) == held_out)


def test_sound_pairs_are_fit_for_training(tmp_path: Path) -> None:
    diagnosis = examined(write(tmp_path / "a.jsonl", pairs(20)))
    assert not diagnosis.findings.counts()
    assert not diagnosis.failed
    assert (diagnosis.rows, diagnosis.usable, diagnosis.kind, diagnosis.format) == (20, 20, "preference", "explicit")
    assert describe(diagnosis).endswith("fit for training")


ODD_CONTENT = [
    (CONTROL_CHARACTERS, "bell \x07", "chosen: bell \\x07 (character 6)"),
    (CONTROL_CHARACTERS, "c1 \x9b", "chosen: c1 \\x9b (character 4)"),
    (INVISIBLE_CHARACTERS, "a\u202eb", "chosen: a\\u202eb (character 2)"),
    (INVISIBLE_CHARACTERS, "a\u2066b", "chosen: a\\u2066b (character 2)"),
    (INVISIBLE_CHARACTERS, "zero\u200bwidth", "chosen: zero\\u200bwidth (character 5)"),
    (INVISIBLE_CHARACTERS, "pass\u200dword", "chosen: pass\\u200dword (character 5)"),
    (INVISIBLE_CHARACTERS, "hi\U000e0041\U000e0042", "chosen: hi\\U000e0041\\U000e0042 (character 3)"),
    (REPLACEMENT_CHARACTERS, "caf\ufffd\ufffd", "chosen: caf\ufffd\ufffd (character 4)"),
    (CONTROL_TOKENS, "a<|im_end|>", "chosen: a<|im_end|> (character 2)"),
    (CONTROL_TOKENS, "a</s>", "chosen: a</s> (character 2)"),
    (CONTROL_TOKENS, "[INST] a", "chosen: [INST] a (character 1)"),
    (CONTROL_TOKENS, "<start_of_turn>a", "chosen: <start_of_turn>a (character 1)"),
    (CONTROL_TOKENS, "a<\uff5cend\uff5c>", "chosen: a<\uff5cend\uff5c> (character 2)"),
    (TEMPLATE_SYNTAX, "a {{ 7*7 }}", "chosen: a {{ 7*7 }} (character 3)"),
    (TEMPLATE_SYNTAX, "{% if a %}", "chosen: {% if a %} (character 1)"),
    (NULL_WORDS, "None", "chosen: 'None'"),
    (NULL_WORDS, " NaN\n", "chosen: ' NaN\\n'"),
]


@pytest.mark.parametrize(("kind", "text", "what"), ODD_CONTENT, ids=[repr(text) for _, text, _ in ODD_CONTENT])
def test_odd_content_is_named_with_its_line_and_field(kind: Kind, text: str, what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(2), pair("odd", text, "other answer")])
    diagnosis = examined(path)
    assert diagnosis.findings.counts() == {kind.name: 1}
    assert places(diagnosis, kind) == [f"{path}:3: {what}"]


HARMLESS = [
    "tab\tand\r\nlines",
    "for i in a[0]: if i < 3 { b }",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "caf\u00e9, na\u00efve \u2014 \u201cquoted\u201d",
    "none of them",
    "<b>bold</b>",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_people_write_is_not_odd(text: str, tmp_path: Path) -> None:
    assert not examined(write(tmp_path / "a.jsonl", [pair("q", text, "other")])).findings.counts()


@pytest.mark.parametrize("token", ["~~STOP~~", "\u2581END", "<|mine|>"])
def test_control_tokens_of_the_tokenizer_in_use_are_found(token: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("q", f"so {token}", "other")])
    diagnosis = examined(path, control_tokens=[token])
    assert places(diagnosis, CONTROL_TOKENS) == [f"{path}:1: chosen: so {token} (character 4)"]


def test_rows_that_cannot_be_used_are_counted_by_kind(tmp_path: Path) -> None:
    bad = [pair("a", 5, "no"), pair("b", "same", "same"), pair("c", "d", None)]
    path = write(tmp_path / "a.jsonl", [*pairs(1), *bad])
    diagnosis = examined(path)
    assert diagnosis.failed
    assert diagnosis.findings.counts() == {WRONG_TYPE.name: 2, EQUAL_RESPONSES.name: 1}
    assert [where for where, _ in diagnosis.findings[WRONG_TYPE].examples] == [f"{path}:2", f"{path}:4"]
    assert (diagnosis.rows, diagnosis.usable) == (4, 1)


def test_a_column_that_nothing_reads_is_named_once_with_its_first_line(tmp_path: Path) -> None:
    rows = [pair("a", "b", "c"), pair("d", "e", "f", source="web", id=1), pair("g", "h", "i", source="web", id=2)]
    path = write(tmp_path / "a.jsonl", rows)
    assert places(examined(path), UNUSED_COLUMN) == [f"{path}:2: 'source'"]


def test_numbers_written_as_text_are_found_but_in_csv_everything_is_text(tmp_path: Path) -> None:
    scores = {"score_chosen": "2", "score_rejected": 1}
    path = write(tmp_path / "a.jsonl", [pair("a", "b", "c", **scores)])
    assert places(examined(path), NUMBER_AS_TEXT) == [f"{path}:1: score_chosen: '2'"]
    table = tmp_path / "a.csv"
    table.write_text("prompt,chosen,rejected,score_chosen,score_rejected\na,b,c,2,1\n")
    assert not examined(table).findings[NUMBER_AS_TEXT].count


def test_a_preference_without_a_prompt_is_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("", "b", "c")])
    assert places(examined(path), NO_PROMPT) == [f"{path}:1: prompt: '' (empty)"]


def test_responses_that_differ_only_in_case_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(1), pair("a", "Yes", "yes ")])
    assert places(examined(path), EQUAL_BUT_FOR_CASE) == [f"{path}:2: chosen and rejected: Yes / yes "]


def test_duplicate_ids_are_named_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, "id": number % 3} for number, row in enumerate(pairs(4))])
    assert places(examined(path), DUPLICATE_ID) == [f"{path}:1 and {path}:4"]


@pytest.mark.parametrize(("count", "severity"), [(20, "warning"), (200, "note")])
def test_few_duplicate_rows_are_a_note_and_many_a_warning(count: int, severity: str, tmp_path: Path) -> None:
    rows = pairs(count)
    path = write(tmp_path / "a.jsonl", [*rows, {**rows[2], "id": "another"}])
    diagnosis = examined(path)
    assert diagnosis.findings.record()[DUPLICATE_ROW.name]["severity"] == severity
    assert places(diagnosis, DUPLICATE_ROW) == [f"{path}:3 and {path}:{count + 1}"]
    assert diagnosis.drops[count + 1].what == f"{path}:3"


def test_pairs_that_contradict_each_other_are_named_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("q", "A", "B"), *pairs(2), pair("q", "B", " A"), pair("r", "B", "A")])
    diagnosis = examined(path)
    assert places(diagnosis, CONTRADICTION) == [f"{path}:1 and {path}:4"]
    assert sorted(diagnosis.drops) == [1, 4]


def test_a_response_that_is_good_and_bad_is_named_with_both_lines(tmp_path: Path) -> None:
    thumbs = [("q", "A", True), ("q", "B", False), ("r", "A", False), ("q", " A", False), ("q", "B", False)]
    rows = [{"prompt": prompt, "completion": said, "label": good} for prompt, said, good in thumbs]
    path = write(tmp_path / "a.jsonl", rows)
    diagnosis = examined(path)
    assert places(diagnosis, CONTRADICTION) == [f"{path}:1 and {path}:4: good and bad"]
    assert sorted(diagnosis.drops) == [1, 4, 5]
    assert diagnosis.drops[5].kind.name == DUPLICATE_ROW.name


def test_a_cycle_is_named_with_all_its_lines(tmp_path: Path) -> None:
    cycle = [pair("q", "A", "B"), pair("q", "B", "C"), pair("q", "C", "A")]
    path = write(tmp_path / "a.jsonl", [*cycle[:2], *pairs(2), cycle[2]])
    diagnosis = examined(path)
    [(where, _)] = diagnosis.findings[CYCLE].examples
    assert sorted(where.replace(" and ", ", ").split(", ")) == [f"{path}:{line}" for line in (1, 2, 5)]
    assert sorted(diagnosis.drops) == [1, 2, 5]
    assert not diagnosis.findings[CONTRADICTION].count


def test_a_ranking_is_compared_by_all_its_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "responses": ["A", "B", "C"]}, {"prompt": "q", "responses": ["C", "A"]}]
    path = write(tmp_path / "a.jsonl", rows)
    assert places(examined(path), CONTRADICTION) == [f"{path}:1 and {path}:2"]


def test_the_longer_response_always_winning_is_a_bias(tmp_path: Path) -> None:
    biased = examined(write(tmp_path / "a.jsonl", [pair(f"q{n}", "long" * 3, "short") for n in range(50)]))
    assert biased.figures["longer_wins"] == 1.0
    assert biased.figures["chosen_longer_mean"] == biased.figures["chosen_longer_median"] == 7.0
    assert biased.findings[LONGER_WINS].count == 1
    few = examined(write(tmp_path / "b.jsonl", [pair("q", "long" * 3, "short")]))
    assert few.figures["longer_wins"] == 1.0
    assert not few.findings[LONGER_WINS].count, "one pair proves nothing"


def test_a_prompt_of_an_evaluation_suite_is_an_error_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(2), pair("the suite's own  question", "b", "c")])
    suite = write(tmp_path / "suite.jsonl", [{"prompt": "other"}, {"prompt": "the suite's own question"}])
    diagnosis = examined(path, suite)
    assert diagnosis.failed
    assert places(diagnosis, LEAK_EXACT) == [f"{path}:3 and {suite}:2: in suite.jsonl"]
    assert list(diagnosis.drops) == [3]


def test_a_chat_that_begins_with_a_question_of_the_suite_is_found(tmp_path: Path) -> None:
    def chat(*contents: str) -> Record:
        roles = ("user", "assistant") * len(contents)
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}

    rows = [chat("other", "a", "the question", "b"), chat("the question", "a", "and then?", "b")]
    path = write(tmp_path / "a.jsonl", rows)
    suite = write(tmp_path / "suite.jsonl", [{"prompt": "the question"}])
    assert places(examined(path, suite), LEAK_EXACT) == [f"{path}:2 and {suite}:1: in suite.jsonl"]
    single = write(tmp_path / "b.jsonl", [{"prompt": "other"}, {"prompt": "and then?"}])
    assert places(examined(single, path), LEAK_EXACT) == [f"{single}:1 and {path}:1: in a.jsonl"]


def test_prompts_that_only_begin_alike_are_no_leak(tmp_path: Path) -> None:
    def asked(*contents: str) -> list[Record]:
        roles = ("user", "assistant", "user")
        return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]

    answers = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
    path = write(tmp_path / "a.jsonl", [pair(asked("hello", "hi", "one"), *answers)])
    suite = write(tmp_path / "suite.jsonl", [{"prompt": asked("hello", "hi", "two")}])
    assert not examined(path, suite).findings.counts()


def test_only_the_held_out_share_of_other_data_counts(tmp_path: Path) -> None:
    texts = [f"question number {n}" for n in range(40)]
    seen, unseen = on_side(False, 0.5, texts), on_side(True, 0.5, texts)
    path = write(tmp_path / "a.jsonl", [pair(seen, "b", "c"), pair(unseen, "b", "c")])
    other = write(tmp_path / "b.jsonl", [{"prompt": seen}, {"prompt": unseen}])
    examination = Examination(held_out=0.0)
    examination.against(scan(DataSource(source=str(other)), Findings()), "other", held_out=0.5)
    for reading in scan(DataSource(source=str(path)), examination.findings):
        examination.see(reading)
    assert places(examination.diagnose(), LEAK_EXACT) == [f"{path}:2 and {other}:2: in other"]


def test_prompts_that_differ_in_case_and_punctuation_leak_between_the_sides(tmp_path: Path) -> None:
    spellings = ["What is it?", "what is it", "What is it!", "WHAT IS IT...", "what, is it", "what is-it", "What's it"]
    kept, trained = on_side(True, 0.3, spellings[:-1]), on_side(False, 0.3, spellings[:-1])
    path = write(tmp_path / "a.jsonl", [pair(trained, "a", "b"), pair(kept, "c", "d")])
    diagnosis = examined(path, held_out=0.3)
    assert places(diagnosis, LEAK_NORMALISED) == [f"{path}:1 and {path}:2"]
    assert not diagnosis.failed


def test_thirteen_words_in_a_row_leak_and_twelve_do_not(tmp_path: Path) -> None:
    run = [f"word{n}" for n in range(13)]
    path = write(
        tmp_path / "a.jsonl",
        [pair(" ".join(["so", *run[:12], "else"]), "a", "b"), pair(" ".join(["Then,", *run]).upper(), "c", "d")],
    )
    suite = write(tmp_path / "suite.jsonl", [{"prompt": " ".join([*run, "here"])}])
    diagnosis = examined(path, suite)
    assert places(diagnosis, LEAK_NGRAMS) == [f"{path}:2 and {suite}:1: in suite.jsonl"]
    assert not diagnosis.drops, "a common pattern is no copy: a person decides"


def test_what_a_prompt_without_words_is_equal_to_is_only_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("???", "a", "b"), pair("!!!", "c", "d")])
    suite = write(tmp_path / "suite.jsonl", [{"prompt": "..."}])
    assert not examined(path, suite).findings.counts()


def test_rows_are_counted_by_their_main_script(tmp_path: Path) -> None:
    texts = ["plain words", "\u041f\u0440\u0438\u0432\u0435\u0442 ok", "\u4f60\u597d\u5417", "12 + 3", "\uff21\uff22"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert examined(path).scripts == {"Latin": 2, "Cyrillic": 1, "Han": 1, "none": 1}


def test_the_report_escapes_what_it_shows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("q\x1b[31m", "\u202edoog", "b" * 500, **{"col\x1b": 1})])
    text = describe(examined(path))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "b" * 200 not in text
    assert all(line.isprintable() for line in text.splitlines())


def test_the_report_begins_with_the_decision_and_ends_with_the_verdict(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(20), pair("q", 5, "b"), pair("a", "<|im_end|>", "c")])
    first, *lines = describe(examined(path)).splitlines()
    assert first == f"{path}: read as `explicit` (preference) by its columns prompt, chosen, rejected"
    assert lines[1] == f"first row, {path}:1"
    assert f"  {path}:21: chosen: 5 (expected text or messages)" in lines
    assert lines.index("error: wrong type: 1") < lines.index("warning: control tokens in content: 1")
    assert lines[-1] == "not fit for training: 1 error, 1 warning"


def test_a_file_without_a_usable_row_is_not_fit_for_training(tmp_path: Path) -> None:
    diagnosis = examined(write(tmp_path / "a.jsonl", [pair("q", "same", "same")]))
    assert (diagnosis.usable, diagnosis.kind) == (0, "")
    text = describe(diagnosis)
    assert text.startswith(f"{tmp_path / 'a.jsonl'}: no row could be read")
    assert text.endswith("not fit for training: no usable row")


def test_the_record_is_json_that_says_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair("q", "A", "B"), pair("q", "A", "B"), pair("r", 1, 2)])
    record = json.loads(json.dumps(examined(path).record(), allow_nan=False))
    assert record["failed"] is True
    assert record["findings"][WRONG_TYPE.name]["examples"] == [
        {"where": f"{path}:3", "what": "chosen: 1 (expected text or messages)"}
    ]
    assert record["better_left_out"] == {DUPLICATE_ROW.name: 1}


def test_without_a_tokenizer_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(3))
    code = (
        "import sys; from data.doctor import Examination; from data.read import scan\n"
        "from pipeline.config import DataSource\n"
        "examination = Examination(held_out=0.1)\n"
        "list(map(examination.see, scan(DataSource(source=sys.argv[1]), examination.findings)))\n"
        "assert examination.diagnose().rows == 3\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, path], cwd=REPOSITORY, check=True)


def test_other_data_with_what_is_held_out_here_is_no_leak(tmp_path: Path) -> None:
    prompt = on_side(True, 0.5, (f"question {n}" for n in range(40)))
    path = write(tmp_path / "a.jsonl", [pair(prompt, "b", "c")])
    assert not examined(path, write(tmp_path / "suite.jsonl", [{"prompt": prompt}]), held_out=0.5).findings.counts()


@pytest.mark.skipif(not HH.is_dir(), reason=f"no real data in {DATA}")
def test_the_real_preference_pairs_are_fit_for_training() -> None:
    path = next(HH.rglob("*.jsonl*"))
    diagnosis = examined(path, held_out=0.1)
    assert (diagnosis.rows, diagnosis.kind, diagnosis.format) == (2312, "preference", "hh")
    assert diagnosis.findings[DIALOGUES_DIFFER].count == 5
    assert all(where.startswith(f"{path}:") for where, _ in diagnosis.findings[DIALOGUES_DIFFER].examples)
    assert not diagnosis.failed
    assert 0.3 < diagnosis.figures["longer_wins"] < 0.7
    assert diagnosis.scripts["Latin"] > 2300
