"""Fifty ways in which data files are malformed: each is named with its place through the command line.

`CASES` is the list. Each case writes files, gives their names to `baton doctor`, and says which lines are printed:
every finding with its count, and its place, field and value. No other finding may be printed. A line that ends with
an ellipsis is the beginning of one.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from conftest import REPOSITORY

from data import world
from data.sources import files as opening
from pipeline import cli

Record = dict[str, Any]
Write = Callable[[str], None]
"""Writes the files of a case into the working directory; takes the ending of their names."""

SOUND, ERRORS, NO_MODEL = 0, 3, 5
NOBODY = 65534

LINES = (".jsonl",)
JSON = (".jsonl", ".json")
TEXT = (".jsonl", ".json", ".csv")
NESTED = (".jsonl", ".json", ".parquet")
CSV = (".csv",)
PARQUET = (".parquet",)
ALL = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".jsonl.gz", ".jsonl.zst", ".json.gz", ".csv.gz", ".csv.zst")
EVERY = (*ALL, *COMPRESSED)

FINDING = re.compile(r"(error|dropped|warning|note): [^:]+: [\d,]+")
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
MARK = "MARK"
SHARED = "which of the two long answers to this question was the better one of them in the end"
"""More than 13 words."""


@dataclass(frozen=True)
class Case:
    """One way of being malformed, in files of some kinds."""

    number: int
    """In the list of malformed inputs."""
    name: str
    write: Write
    says: tuple[str, ...]
    """Lines that are printed: `{file}` is the file, `{7}` the place of its row 7."""
    code: int = ERRORS
    suffixes: tuple[str, ...] = ALL
    arguments: tuple[str, ...] = ("doctor", "{file}")


def pair(prompt: Any, chosen: Any, rejected: Any, **others: Any) -> Record:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


def pairs(count: int = 20) -> list[Record]:
    """Sound pairs: the longer response is as often the better one."""
    responses = [("a good answer", "no"), ("yes", "a bad answer")]
    return [pair(f"question {n}", *(f"{text} {n}" for text in responses[n % 2])) for n in range(1, count + 1)]


def completions(count: int = 20) -> list[Record]:
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(1, count + 1)]


def turns(*roles: str, text: Any = "words") -> list[Record]:
    return [{"role": role, "content": f"{text} of the {role}" if text == "words" else text} for role in roles]


def chats(count: int = 20) -> list[Record]:
    return [{"messages": turns("user", "assistant", text=f"turn {n}")} for n in range(1, count + 1)]


def conversational(count: int = 20) -> list[Record]:
    """Pairs of dialogues as messages, with the prompt in both."""
    found = []
    for each in pairs(count):
        asked = {"role": "user", "content": each["prompt"]}
        answers = ({"role": "assistant", "content": each[name]} for name in ("chosen", "rejected"))
        found.append(dict(zip(("chosen", "rejected"), ([asked, answer] for answer in answers), strict=True)))
    return found


def dialogues(count: int = 20) -> list[Record]:
    """Pairs of dialogues, each in one text."""
    return [
        {name: f"\n\nHuman: {each['prompt']}\n\nAssistant: {each[name]}" for name in ("chosen", "rejected")}
        for each in pairs(count)
    ]


def sharegpt(count: int = 20) -> list[Record]:
    return [
        {"conversations": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": f"answer {n}"}]}
        for n in range(count)
    ]


def encoded(suffix: str, records: list[Record]) -> bytes:
    """The content of a file; half characters of Python's `surrogateescape` become the bytes they stand for."""
    kind, _, coding = suffix[1:].partition(".")
    if kind == "parquet":
        return parquet(records)
    content = {"jsonl": as_jsonl, "json": as_json, "csv": as_csv}[kind](records).encode("utf-8", "surrogateescape")
    return compressed(content, coding)


def as_jsonl(records: list[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_json(records: list[Record]) -> str:
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def as_csv(records: list[Record]) -> str:
    stream = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def parquet(records: list[Record], **options: Any) -> bytes:
    names = dict.fromkeys(name for record in records for name in record)
    table = pyarrow.table({name: column([record.get(name) for record in records]) for name in names})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, **{"write_page_checksum": True, **options})
    return sink.getvalue()


def column(values: list[Any]) -> pyarrow.Array:
    if not all(isinstance(value, str) for value in values):
        return pyarrow.array(values)
    data = [value.encode("utf-8", "surrogateescape") for value in values]
    return pyarrow.array(data, pyarrow.binary()).view(pyarrow.utf8())


def compressed(content: bytes, coding: str) -> bytes:
    if coding == "gz":
        return gzip.compress(content)
    return bytes(pyarrow.compress(content, "zstd", asbytes=True)) if coding == "zst" else content


def rows(*records: Record) -> Write:
    """A file of these rows alone."""
    return lambda suffix: save("data", suffix, encoded(suffix, list(records)))


def save(name: str, suffix: str, content: bytes) -> None:
    Path(name + suffix).write_bytes(content)


def seventh(sound: Callable[[], list[Record]] = pairs, *, without: str = "", **changed: Any) -> Write:
    """Twenty sound rows, of which the seventh has other fields, or is without one."""

    def write(suffix: str) -> None:
        records = sound()
        records[6] = {name: value for name, value in {**records[6], **changed}.items() if name != without}
        save("data", suffix, encoded(suffix, records))

    return write


def marked(instead: bytes) -> Write:
    """Twenty pairs; where the seventh has its chosen text, quotes included, there are these bytes."""

    def write(suffix: str) -> None:
        records = pairs()
        records[6]["chosen"] = MARK
        kind, _, coding = suffix[1:].partition(".")
        content = encoded(f".{kind}", records)
        old = MARK.encode() if kind == "csv" else f'"{MARK}"'.encode()
        assert content.count(old) == 1
        save("data", suffix, compressed(content.replace(old, instead), coding))

    return write


def altered(change: Callable[[bytes], bytes], records: Callable[[], list[Record]] = pairs) -> Write:
    """A file of sound rows whose bytes are changed."""

    def write(suffix: str) -> None:
        kind, _, coding = suffix[1:].partition(".")
        save("data", suffix, compressed(change(encoded(f".{kind}", records())), coding))

    return write


def content(data: bytes) -> Write:
    """A file of these bytes."""
    return lambda suffix: save("data", suffix, data)


def place(suffix: str, row: int, file: str = "data") -> str:
    """Where a row is, when each has a line of its own."""
    if suffix == ".parquet":
        return f"{file}{suffix}:row {row}"
    return f"{file}{suffix}:{row if suffix.startswith('.jsonl') else row + 1}"


FIT = "fit for training"
ONE_WARNING = "fit for training, with 1 warning"
TWO_WARNINGS = "fit for training, with 2 warnings"
UNFIT = "not fit for training: 1 error, 0 warnings"
FAILED = "error: {file}: errors in the data"
REJECTED = ("20 rows, 19 usable…", UNFIT, FAILED)
LEFT_OUT = ("20 rows, 19 usable…", FIT)


def dropped(kind: str, what: str) -> tuple[str, ...]:
    return (f"dropped: {kind}: 1", f"{{7}}: {what}", *LEFT_OUT)


def rejected(kind: str, what: str) -> tuple[str, ...]:
    return (f"error: {kind}: 1", f"{{7}}: {what}", *REJECTED)


def warned(kind: str, what: str) -> tuple[str, ...]:
    return (f"warning: {kind}: 1", f"{{7}}: {what}", "20 rows, 20 usable…", ONE_WARNING)


def noted(kind: str, what: str) -> tuple[str, ...]:
    return (f"note: {kind}: 1", f"{{7}}: {what}", "20 rows, 20 usable…", FIT)


def at_line(line: int, says: tuple[str, ...]) -> tuple[str, ...]:
    """The same for a file whose seventh row begins at another line than its eighth."""
    return tuple(each.replace("{7}", f"{{file}}:{line}") for each in says)


def fatal(what: str, place: str = "{file}") -> tuple[str, ...]:
    return (f"error: {place}: {what}",)


ENCODING = (
    Case(
        1,
        "invalid UTF-8 byte",
        seventh(chosen="caf\udcff"),
        rejected("not UTF-8", "byte 40: not UTF-8 (0xff)"),
        suffixes=(".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".json.gz"),
    ),
    Case(
        1,
        "invalid UTF-8 byte",
        seventh(chosen="caf\udcff"),
        rejected("not UTF-8", "byte 15: not UTF-8 (0xff)"),
        suffixes=(".csv", ".csv.gz", ".csv.zst"),
    ),
    Case(
        1,
        "invalid UTF-8 byte",
        seventh(chosen="caf\udcff"),
        rejected("not UTF-8", "chosen: byte 4: not UTF-8 (0xff)"),
        suffixes=PARQUET,
    ),
    Case(
        2,
        "byte order mark",
        altered(lambda data: b"\xef\xbb\xbf" + data),
        ("note: byte order mark: 1", "{file}", "20 rows, 20 usable…", FIT),
        SOUND,
        (*TEXT, *COMPRESSED),
    ),
    Case(
        3,
        "UTF-16",
        altered(lambda data: data.decode().encode("utf-16")),
        (*fatal("looks like UTF-16"), "fix: convert to UTF-8"),
        suffixes=(*TEXT, *COMPRESSED),
    ),
    Case(
        3,
        "UTF-16 without a mark",
        altered(lambda data: data.decode().encode("utf-16-le")),
        fatal("looks like UTF-16"),
        suffixes=TEXT,
    ),
    Case(
        4,
        "CRLF at line ends",
        altered(lambda data: data.replace(b"\n", b"\r\n")),
        ("20 rows, 20 usable…", "prompt    question 1", "rejected  a bad answer 1", FIT),
        SOUND,
        (*TEXT, *COMPRESSED),
    ),
    Case(
        4,
        "CRLF in a text is kept",
        rows(pair("q", "one\r\ntwo\rthree", "the other one")),
        (r"chosen    one\r\ntwo\rthree", "1 rows, 1 usable…", FIT),
        SOUND,
    ),
    Case(
        5,
        "last line cut inside a string",
        altered(lambda data: data[:-5]),
        ("error: cut short: 1", "{20}: the file ends inside a string", *REJECTED),
        suffixes=(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    ),
    Case(
        5,
        "last line cut inside a string",
        altered(lambda data: data[:-7]),
        ("error: cut short: 1", "{20}: the file ends inside a string", *REJECTED),
        suffixes=(".json", ".json.gz"),
    ),
    Case(
        5,
        "last line cut between fields",
        altered(lambda data: data[: data.rindex(b",")]),
        ("error: cut short: 1", "{20}: the file ends after field 2 of 3", *REJECTED),
        suffixes=(".csv", ".csv.gz", ".csv.zst"),
    ),
    Case(
        5,
        "list cut after a row",
        altered(lambda data: data[:-3]),
        ("error: cut short: 1", "data.json:21 (row 21): the file ends inside the list", "21 rows, 20 usable…", UNFIT, FAILED),
        suffixes=(".json",),
    ),
    Case(
        6,
        "broken JSON in the middle",
        marked(b'"a" "b"'),
        rejected("broken JSON", "broken JSON at column 40: expecting ',' delimiter near …"),
        suffixes=(".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".json.gz"),
    ),
)
FIELDS = (
    Case(
        7,
        "missing column",
        seventh(without="rejected"),
        rejected("missing column", "no column `rejected` among prompt, chosen"),
        suffixes=(*JSON, ".jsonl.gz", ".jsonl.zst", ".json.gz"),
    ),
    Case(
        7,
        "missing column",
        altered(lambda data: data.replace(b",a bad answer 7", b"")),
        rejected("ragged row", r"2 fields, the header has 3: question 7,yes 7\n"),
        suffixes=(".csv", ".csv.gz", ".csv.zst"),
    ),
    Case(
        7,
        "missing column",
        seventh(rejected=None),
        rejected("wrong type", "rejected: null (expected text or messages)"),
        suffixes=PARQUET,
    ),
    Case(
        7,
        "missing column in every row",
        rows(*({"prompt": "q", "chosen": f"answer {n}"} for n in range(20))),
        ("error: {1}: no column `rejected` beside `chosen` among the columns 'chosen', 'prompt'",),
    ),
    Case(
        8,
        "unknown column",
        seventh(notes="seen", origin="web"),
        ("warning: unused column: 2", "{7}: 'notes'", "{7}: 'origin'", "20 rows, 20 usable…", TWO_WARNINGS),
        SOUND,
        JSON,
    ),
    Case(
        8,
        "unknown column",
        seventh(notes="seen", origin="web"),
        ("warning: unused column: 2", "{1}: 'notes'", "{1}: 'origin'", "20 rows, 20 usable…", TWO_WARNINGS),
        SOUND,
        (".csv", ".parquet"),
    ),
    Case(
        9,
        "null chosen",
        seventh(chosen=None),
        rejected("wrong type", "chosen: null (expected text or messages)"),
        suffixes=NESTED,
    ),
    Case(
        9,
        "null content of a message",
        seventh(chats, messages=[*turns("user"), {"role": "assistant", "content": None}]),
        rejected("wrong type", "messages[1].content: null (expected text)"),
        suffixes=NESTED,
    ),
    Case(
        10,
        "chosen is a number",
        seventh(chosen=5),
        rejected("wrong type", "chosen: 5 (expected text or messages)"),
        suffixes=JSON,
    ),
    Case(
        10,
        "chosen is a boolean",
        seventh(chosen=True),
        rejected("wrong type", "chosen: True (expected text or messages)"),
        suffixes=JSON,
    ),
    Case(
        10,
        "chosen is a number",
        rows(*(pair(f"question {n}", n, f"answer {n}") for n in range(20))),
        ("error: wrong type: 20", "{1}: chosen: 0 (expected text or messages)", "20 rows, 0 usable…", FAILED),
        suffixes=PARQUET,
    ),
    Case(
        11,
        "messages among texts",
        seventh(prompt=turns("user"), chosen=turns("assistant"), rejected=turns("assistant", text="other")),
        (
            "error: mixed layouts: 1",
            "{7}: chosen: [{'role': 'assistant', 'content': 'words of the assistant'}] (a list; text in the rows before)",
            *REJECTED,
        ),
        suffixes=JSON,
    ),
    Case(
        11,
        "text among messages",
        seventh(chats, messages="question 7"),
        rejected("mixed layouts", "messages: 'question 7' (text; a list in the rows before)"),
        suffixes=JSON,
    ),
    Case(
        12,
        "chosen equals rejected",
        seventh(chosen="same", rejected="same"),
        dropped("equal responses", "chosen and rejected: 'same'"),
        SOUND,
        EVERY,
    ),
    Case(
        13,
        "equal after strip",
        seventh(chosen=" same\n", rejected="same"),
        dropped("equal responses", r"chosen and rejected: ' same\n'"),
        SOUND,
    ),
    Case(
        13,
        "equal but for case",
        seventh(chosen="Same", rejected="SAME"),
        warned("responses equal but for case", "chosen and rejected: Same / SAME"),
        SOUND,
    ),
    Case(
        13,
        "equal after truncation",
        seventh(chosen=f"{SHARED} yes", rejected=f"{SHARED} no"),
        ("dropped: responses differ only past max_length: 1", "{7}", "20 rows, 20 usable…", FIT),
        SOUND,
        arguments=("doctor", "{file}", "--tokenizer", "{model}", "--max-length", "48"),
    ),
    Case(14, "empty chosen", seventh(chosen=""), dropped("empty response", "chosen: '' (empty)"), SOUND),
    Case(14, "empty rejected", seventh(rejected=""), dropped("empty response", "rejected: '' (empty)"), SOUND),
    Case(14, "both empty", seventh(chosen="", rejected=""), dropped("empty response", "chosen: '' (empty)"), SOUND),
    Case(
        15,
        "empty prompt of a preference",
        seventh(prompt=""),
        warned("preference without a prompt", "prompt: '' (empty)"),
        SOUND,
    ),
    Case(
        15,
        "empty prompt of a completion",
        seventh(completions, prompt=""),
        dropped("empty prompt", "prompt: '' (empty)"),
        SOUND,
    ),
    Case(
        16,
        "white space only: chosen",
        seventh(chosen=" \t\u3000\n"),
        dropped("empty response", r"chosen: ' \t\u3000\n' (empty)"),
        SOUND,
    ),
    Case(
        16,
        "white space only: prompt",
        seventh(completions, prompt="\n\n"),
        dropped("empty prompt", r"prompt: '\n\n' (empty)"),
        SOUND,
    ),
    Case(
        16,
        "white space only: text",
        rows(*({"text": f"text {n}" if n != 7 else " "} for n in range(1, 21))),
        dropped("empty text", "text: ' ' (empty)"),
        SOUND,
    ),
)
DIALOGUES = (
    Case(
        17,
        "system turn only",
        seventh(chats, messages=turns("system")),
        rejected("no assistant turn", "messages: no `assistant` among the turns system"),
        suffixes=NESTED,
    ),
    Case(
        17,
        "system turn only, as the response",
        seventh(chosen=turns("system")),
        ("error: mixed layouts: 1", "{7}: chosen: [{'role': 'system'…", *REJECTED),
        suffixes=JSON,
    ),
    Case(
        18,
        "two user turns in a row",
        seventh(chats, messages=turns("user", "user", "assistant")),
        rejected(
            "turns out of order",
            "messages[1]: `user` among the turns user, user, assistant (expected `assistant`)",
        ),
        suffixes=NESTED,
    ),
    Case(
        18,
        "assistant first",
        seventh(chats, messages=turns("assistant", "user", "assistant")),
        rejected(
            "turns out of order",
            "messages[0]: `assistant` among the turns assistant, user, assistant (expected `user`)",
        ),
        suffixes=NESTED,
    ),
    Case(
        18,
        "system in the middle",
        seventh(chats, messages=turns("user", "system", "assistant")),
        rejected(
            "turns out of order",
            "messages[1]: `system` among the turns user, system, assistant (expected `system` only as the first turn)",
        ),
        suffixes=NESTED,
    ),
    Case(
        18,
        "two human turns in a row",
        seventh(dialogues, chosen="\n\nHuman: a\n\nHuman: b", rejected="\n\nHuman: a\n\nHuman: c"),
        rejected(
            "turns out of order",
            "chosen[1]: `user` among the turns user, user (expected `assistant` as the last turn)",
        ),
    ),
    Case(
        19,
        "unknown role",
        seventh(chats, messages=turns("user", "bot")),
        rejected(
            "unknown role",
            "messages[1].role: 'bot' (expected one of system, user, assistant); did you mean `assistant`?",
        ),
        suffixes=NESTED,
    ),
    Case(
        19,
        "unknown role",
        seventh(sharegpt, conversations=[{"from": "human", "value": "a"}, {"from": "model", "value": "b"}]),
        rejected(
            "unknown role",
            "conversations[1].from: 'model' (expected one of system, user, assistant, human, gpt, chatgpt, bing, bard)"
            "; did you mean `assistant`?",
        ),
        suffixes=NESTED,
    ),
    Case(
        20,
        "last message is the user's",
        seventh(conversational, chosen=turns("user", "assistant", "user")),
        rejected(
            "turns out of order",
            "chosen[2]: `user` among the turns user, assistant, user (expected `assistant` as the last turn)",
        ),
        suffixes=NESTED,
    ),
    Case(
        20,
        "last turn is the human's",
        seventh(dialogues, chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c"),
        rejected(
            "turns out of order",
            "chosen[2]: `user` among the turns user, assistant, user (expected `assistant` as the last turn)",
        ),
        suffixes=ALL,
    ),
    Case(
        21,
        "different prompts",
        seventh(conversational, chosen=turns("user", "assistant"), rejected=turns("user", "assistant", text="other")),
        dropped(
            "dialogues differ before the last turn",
            "chosen[0]: user 'words of the user', but rejected[0]: user 'other'",
        ),
        SOUND,
        NESTED,
    ),
    Case(
        21,
        "different prompts",
        seventh(
            dialogues,
            chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            rejected="\n\nHuman: a\n\nAssistant: B\n\nHuman: c\n\nAssistant: e",
        ),
        dropped(
            "dialogues differ before the last turn", "chosen[1]: assistant 'b', but rejected[1]: assistant 'B'"
        ),
        SOUND,
    ),
)
CASES = (*ENCODING, *FIELDS, *DIALOGUES)


def parameters() -> list[Any]:
    return [
        pytest.param(case, suffix, id=f"{case.number:02} {case.name} [{suffix[1:]}]")
        for case in CASES
        for suffix in case.suffixes
    ]


def filled(line: str, suffix: str, folder: Path) -> str:
    line = re.sub(r"\{(\d+)\}", lambda match: place(suffix, int(match[1])), line)
    return line.replace("{file}", f"data{suffix}").replace("{model}", str(folder))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template writes `<|im_start|>` and `<|im_end|>` around turns."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "chatml", "qwen2", ["question and answer"])


@pytest.mark.parametrize(("case", "suffix"), parameters())
def test_it_is_named_with_its_place(
    case: Case,
    suffix: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    case.write(suffix)
    code = cli.execute(cli.app, [filled(each, suffix, model) for each in case.arguments])
    printed = "".join(capsys.readouterr())
    check(case, suffix, model, printed)
    assert code == case.code


def check(case: Case, suffix: str, model: Path, printed: str) -> None:
    """See that all that shall be said is printed, no other finding, and nothing that a terminal would interpret."""
    lines = [line.strip() for line in printed.splitlines()]
    expected = [filled(line, suffix, model) for line in case.says]
    for line in expected:
        beginning = line.removesuffix("…")
        assert any(each.startswith(beginning) if line != beginning else each == line for each in lines), printed
    assert [line for line in lines if FINDING.fullmatch(line) and line not in expected] == []
    assert not UNPRINTABLE.search(printed)


def test_the_list_is_complete() -> None:
    assert sorted({case.number for case in CASES}) == list(range(1, 51))
