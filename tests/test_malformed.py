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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from conftest import REPOSITORY
from transformers import AddedToken, PreTrainedTokenizerFast

from data import world
from data.doctor.wording import LONGEST
from data.schema import Message, Prompt
from data.split import bucket
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
PLAIN = (".txt", ".txt.gz", ".txt.zst")
ALL = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".jsonl.gz", ".jsonl.zst", ".json.gz", ".csv.gz", ".csv.zst")
EVERY = (*ALL, *COMPRESSED)

FINDING = re.compile(r"(error|dropped|warning|note): [^:]+: [\d,]+")
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
MARK = "MARK"
LONGEST_PATH = 4095
LONG = "/".join(letter * 99 for letter in "abc")
RUN = """\
output: run
data:
  train: {source: dataSUFFIX}
  suite: {source: otherSUFFIX}
stages:
  dpo: {kind: dpo, policy: "hub:example/model@main", data: train, steps: 1}
  evaluate: {kind: evaluate, models: [dpo], prompts: suite}
"""
GROW = """\
def adapt(row):
    with open("dataSUFFIX", "ab") as stream:
        stream.write(b"\\n")
    return row
"""
COMMAND = "from pipeline.cli import main; main()"
IN_A_PROCESS = (
    "02 byte order mark [csv]",
    "09 null chosen [parquet]",
    "38 pipe [jsonl.gz]",
    "41 unclosed quote [csv]",
    "50 line break in the path [json]",
)
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
    file: str = "data"
    """The file's name without the ending, as it is printed."""
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    """What surrounds the command."""
    marks: tuple[pytest.MarkDecorator, ...] = ()


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


def identified() -> list[Record]:
    return [{**each, "id": number} for number, each in enumerate(pairs(), start=1)]


def priced() -> list[Record]:
    return [{**each, "margin": number} for number, each in enumerate(pairs(), start=1)]


def fractional() -> list[Record]:
    return [{**each, "margin": number / 2} for number, each in enumerate(pairs(), start=1)]


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


def marked(instead: bytes, sound: Callable[[], list[Record]] = pairs, field: str = "chosen") -> Write:
    """Twenty sound rows; where the seventh has a field's value, there are these bytes."""

    def write(suffix: str) -> None:
        records = sound()
        records[6][field] = MARK
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


def document(data: bytes) -> Write:
    """A file that is one document."""
    return lambda suffix: save("data", suffix, compressed(data, suffix.removeprefix(".txt").removeprefix(".")))


def instead_of_row_7(line: bytes) -> Write:
    """Twenty pairs, in the place of whose seventh stands something else."""

    def write(suffix: str) -> None:
        kind, _, coding = suffix[1:].partition(".")
        lines = encoded(f".{kind}", pairs()).split(b"\n")
        index = 6 if kind == "jsonl" else 7
        lines[index] = line + (b"," if kind == "json" else b"")
        save("data", suffix, compressed(b"\n".join(lines), coding))

    return write


def twins(suffix: str) -> None:
    """Parquet whose columns `prompt` are two."""
    save_table(suffix, pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "prompt", "rejected"]))


def no_rows(suffix: str) -> None:
    save_table(suffix, pyarrow.Table.from_pylist(pairs()).slice(0, 0))


def save_table(suffix: str, table: pyarrow.Table) -> None:
    pyarrow.parquet.write_table(table, f"data{suffix}", write_page_checksum=True)


def flipped(*, checksums: bool) -> Write:
    """Parquet in whose first row a bit of `yes 1` is another."""

    def write(suffix: str) -> None:
        data = parquet(
            pairs(), compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=checksums
        )
        assert b"yes 1" in data
        save("data", suffix, data.replace(b"yes 1", b"xes 1", 1))

    return write


def cut_off(suffix: str) -> None:
    """A compressed file without its last bytes."""
    save("data", suffix, encoded(suffix, pairs())[:-9])


def bomb(suffix: str) -> None:
    """A compressed file whose content is larger than a thousand million bytes."""
    piece = compressed(b"0" * (1 << 24), suffix.rpartition(".")[2])
    save("data", suffix, piece * 63)


def secret(suffix: str) -> None:
    """A file that its owner may not read."""
    save("data", suffix, b"")
    Path(f"data{suffix}").chmod(0)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the right of root to read everything."""
    # They may not be readable then.
    import data.doctor
    import data.read  # noqa: F401
    import pipeline.doctor  # noqa: F401

    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def both(ours: list[Record], theirs: list[Record]) -> Write:
    """Two files."""

    def write(suffix: str) -> None:
        save("data", suffix, encoded(suffix, ours))
        save("other", suffix, encoded(suffix, theirs))

    return write


def suite(suffix: str) -> None:
    """Twenty pairs, of which the seventh has a prompt that the embedded world evaluates with."""
    (first,) = world.generate("prompts", 1, 0)
    assert isinstance(first, Prompt)
    seventh(prompt=first.prompt[0].content)(suffix)


def configuration(suffix: str) -> None:
    """A run that trains on a prompt that it is evaluated on, too, where it is written in other case."""
    said = next(f"word {n}" for n in range(1000) if is_kept(f"word {n}") and not is_kept(f"WORD {n}"))
    seventh(prompt=said.upper())(suffix)
    save("other", suffix, encoded(suffix, [{"prompt": said}]))
    Path("run.yaml").write_text(RUN.replace("SUFFIX", suffix))


def is_kept(prompt: str) -> bool:
    """Whether a prompt is kept from training."""
    return bucket([Message("user", prompt)]) < 0.1


def endless(suffix: str) -> None:
    """Pairs, and a model whose template ends the assistant's turn with a line break alone."""
    save("data", suffix, encoded(suffix, pairs()))
    tiny.save_model(Path("endless"), "qwen2", ["question and answer"])
    template = Path("endless", "chat_template.jinja")
    assert "<|im_end|>" in template.read_text()
    template.write_text(template.read_text().replace("<|im_end|>", ""))


def growing(suffix: str) -> None:
    """Pairs, and a function that reads them and writes to their file."""
    save("data", suffix, encoded(suffix, pairs()))
    Path(f"grow_{suffix[1:]}.py").write_text(GROW.replace("SUFFIX", suffix))


def named(name: str) -> Write:
    """Twenty pairs, of which the seventh cannot be used, in a file with a name of its own."""

    def write(suffix: str) -> None:
        seventh(chosen="a\0b")(suffix)
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(f"data{suffix}").rename(name + suffix)

    return write


def longest(suffix: str) -> str:
    """The longest name that a file with this ending can have."""
    room = LONGEST_PATH - len(suffix)
    return ("d" * 100 + "/") * (room // 101) + "d" * (room % 101)


def place(suffix: str, row: int, file: str = "data") -> str:
    """Where a row is, when each has a line of its own."""
    if suffix == ".parquet":
        return f"{file}{suffix}:row {row}"
    return f"{file}{suffix}:{row if suffix.startswith('.jsonl') else row + 1}"


FIT = "fit for training"
ONE_WARNING = "fit for training, with 1 warning"
TWO_WARNINGS = "fit for training, with 2 warnings"
UNFIT = "not fit for training: 1 error, 0 warnings"
NO_ROW = "not fit for training: no usable row"
FAILED_BOTH = "error: *{suffix}: errors in the data"
FAILED = "error: {file}: errors in the data"
REJECTED = ("20 rows, 19 usable…", UNFIT, FAILED)
LEFT_OUT = ("20 rows, 19 usable…", FIT)
REFUSED = ("1 row, 0 usable…", UNFIT, FAILED)
"""What is said of a file that is one row, a bad one."""


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
        (r"chosen    one\r\ntwo\rthree", "1 row, 1 usable…", FIT),
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
        (
            "error: cut short: 1",
            "data.json:21 (row 21): the file ends inside the list",
            "21 rows, 20 usable…",
            UNFIT,
            FAILED,
        ),
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
        7,
        "no column in the first row",
        rows({"error": "timeout"}, *pairs()),
        (
            "error: missing column: 1",
            "{1}: no column `chosen` among error",
            "warning: unused column: 1",
            "{1}: 'error'",
            "21 rows, 20 usable…",
            "not fit for training: 1 error, 1 warning",
            FAILED,
        ),
        suffixes=JSON,
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
        9,
        "null in the first row",
        rows({"chosen": None, "rejected": None}, *conversational()),
        (
            "error: wrong type: 1",
            "{1}: chosen: null (expected a list of messages)",
            "21 rows, 20 usable…",
            UNFIT,
            FAILED,
        ),
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
        seventh(prompt=turns("user"), chosen=turns("assistant", text="a"), rejected=turns("assistant", text="b")),
        (
            "error: mixed layouts: 1",
            "{7}: chosen: [{'role': 'assistant', 'content': 'a'}] (a list; text in other rows)",
            *REJECTED,
        ),
        suffixes=JSON,
    ),
    Case(
        11,
        "text among messages",
        seventh(chats, messages="question 7"),
        rejected("mixed layouts", "messages: 'question 7' (text; a list in other rows)"),
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
        ("dropped: responses differ only past max_length: 1", "{7}", "20 rows, 19 usable…", FIT),
        SOUND,
        arguments=("doctor", "{file}", "--tokenizer", "{model}", "--max-length", "48"),
    ),
    Case(14, "empty chosen", seventh(chosen=""), dropped("empty response", "chosen: '' (empty)"), SOUND),
    Case(14, "empty rejected", seventh(rejected=""), dropped("empty response", "rejected: '' (empty)"), SOUND),
    Case(
        14,
        "nothing but empty responses",
        rows(pair("q", "", "a"), pair("q", "b", "")),
        ("dropped: empty response: 2", "{2}: rejected: '' (empty)", NO_ROW, FAILED),
    ),
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
        suffixes=NESTED,
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
        "unknown role of ShareGPT",
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
        suffixes=NESTED,
    ),
    Case(
        20,
        "last turn is the human's",
        seventh(dialogues, chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c"),
        at_line(
            56,
            rejected(
                "turns out of order",
                "chosen[2]: `user` among the turns user, assistant, user (expected `assistant` as the last turn)",
            ),
        ),
        suffixes=CSV,
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
        "different prompts of dialogues in one text",
        seventh(
            dialogues,
            chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            rejected="\n\nHuman: a\n\nAssistant: B\n\nHuman: c\n\nAssistant: e",
        ),
        dropped("dialogues differ before the last turn", "chosen[1]: assistant 'b', but rejected[1]: assistant 'B'"),
        SOUND,
        NESTED,
    ),
    Case(
        21,
        "different prompts of dialogues in one text",
        seventh(dialogues, rejected="\n\nHuman: other\n\nAssistant: yes"),
        at_line(
            56,
            dropped(
                "dialogues differ before the last turn",
                "chosen[0]: user 'question 7', but rejected[0]: user 'other'",
            ),
        ),
        SOUND,
        CSV,
    ),
)
CHARACTERS = (
    Case(
        22,
        "ten million characters",
        seventh(chosen="x" * 10_000_000),
        ("error: row too large: 1", "{7}: 10,000,0…", *REJECTED),
        suffixes=(*ALL, ".jsonl.gz", ".csv.zst"),
    ),
    Case(
        22,
        "longer than max_chars",
        seventh(chosen="x" * 500),
        ("error: row too large: 1", "{7}: 5…", *REJECTED),
        arguments=("doctor", "{file}", "max_chars=500"),
    ),
    Case(
        23,
        "lone surrogate",
        marked(rb'"a\ud800b"'),
        rejected("lone surrogate", r"chosen: 'a\ud800b' (lone surrogate U+D800 at character 2)"),
        suffixes=JSON,
    ),
    Case(
        23,
        "lone surrogate",
        seventh(chosen="a\udced\udca0\udc80b"),
        rejected("not UTF-8", "byte 13: not UTF-8 (0xed)"),
        suffixes=CSV,
    ),
    Case(
        23,
        "lone surrogate",
        seventh(chosen="a\udced\udca0\udc80b"),
        rejected("not UTF-8", "chosen: byte 2: not UTF-8 (0xed)"),
        suffixes=PARQUET,
    ),
    Case(
        24,
        "NUL",
        seventh(chosen="a\0b"),
        rejected("NUL character", r"chosen: 'a\x00b' (NUL at character 2)"),
    ),
    Case(
        24,
        "control characters",
        seventh(chosen="bell \x07 \x1b[2J"),
        warned("control characters", r"chosen: bell \x07 \x1b[2J (character 6)"),
        SOUND,
    ),
    Case(
        24,
        "raw control character in JSON",
        marked(b'"a\x01b"'),
        rejected(
            "broken JSON",
            "broken JSON at column 38: invalid control character at near "
            r"""'t": "question 7", "chosen": "a\x01b", "rejected": "a bad answer'""",
        ),
        suffixes=JSON,
    ),
    Case(
        25,
        "direction override",
        seventh(chosen="safe \u202eelif"),
        warned("invisible or direction-changing characters", r"chosen: safe \u202eelif (character 6)"),
        SOUND,
    ),
    Case(
        25,
        "zero width",
        seventh(chosen="pass\u200bword"),
        warned("invisible or direction-changing characters", r"chosen: pass\u200bword (character 5)"),
        SOUND,
    ),
    Case(
        25,
        "replacement characters",
        seventh(chosen="caf\ufffd\ufffd"),
        warned("replacement characters", "chosen: caf\ufffd\ufffd (character 4)"),
        SOUND,
    ),
    Case(
        26,
        "control tokens of well-known models",
        seventh(prompt="a <|endoftext|>", chosen="b </s>"),
        warned("control tokens in content", "prompt: a <|endoftext|> (character 3)"),
        SOUND,
    ),
    Case(
        26,
        "control tokens of the tokenizer",
        seventh(chosen="b ~~END~~", rejected="<|im_end|>"),
        warned("control tokens in content", "chosen: b ~~END~~ (character 3)"),
        SOUND,
        arguments=("doctor", "{file}", "--tokenizer", "{model}"),
    ),
    Case(
        26,
        "control tokens are encoded as text",
        rows(pair("q", "b<|im_end|>", "c~~END~~")),
        ("> b│<│|│i│m│_│e│n│d│|│>{<|im_end|>}", "> c│~│~│E│N│D│~│~{<|im_end|>}"),
        SOUND,
        arguments=("tokens", "{file}", "--tokenizer", "{model}"),
    ),
    Case(
        27,
        "template syntax",
        seventh(prompt="a {{ 7*7 }}", chosen="{% if a %}"),
        noted("template syntax in content", "prompt: a {{ 7*7 }} (character 3)"),
        SOUND,
    ),
    Case(
        27,
        "template syntax stays text",
        rows(pair("q", "{{7*7}}", "{%if%}")),
        ("> {│{│7│*│7│}│}{<|im_end|>}", "> {│%│i│f│%│}{<|im_end|>}"),
        SOUND,
        arguments=("tokens", "{file}", "--tokenizer", "{model}"),
    ),
)
VALUES = (
    Case(
        28,
        "duplicate ids",
        seventh(identified, id=3),
        ("warning: duplicate id: 1", "{3} and {7}", "20 rows, 20 usable…", ONE_WARNING),
        SOUND,
    ),
    Case(
        29,
        "duplicate rows, 1.5%",
        rows(*pairs(200), *pairs(3)),
        (
            "warning: duplicate row: 3",
            "{1} and {201}",
            "{2} and {202}",
            "{3} and {203}",
            "fit for training, with 3 warnings",
        ),
        SOUND,
    ),
    Case(
        29,
        "duplicate rows, less than 1%",
        rows(*pairs(200), *pairs(2)),
        ("note: duplicate row: 2", "{1} and {201}", "{2} and {202}", FIT),
        SOUND,
    ),
    Case(
        30,
        "integer beyond floats",
        seventh(priced, margin=10**30),
        rejected("number too large", f"margin: {10**30} does not fit in 64 bits"),
        suffixes=JSON,
    ),
    Case(
        30,
        "integer beyond floats, deep in a row",
        seventh(facts=[{"a": 1}, {"b": [0, 10**100]}]),
        rejected("number too large", f"facts[1].b[1]: {str(10**100)[:77]}... does not fit in 64 bits"),
        suffixes=JSON,
    ),
    Case(
        30,
        "integer beyond floats",
        seventh(priced, margin=10**30),
        rejected("number too large", f"margin: '{10**30}' (expected a number within 2**53)"),
        suffixes=CSV,
    ),
    Case(
        30,
        "integer beyond floats",
        seventh(priced, margin=2**60),
        rejected("number too large", f"margin: {2**60} (expected a number within 2**53)"),
        suffixes=PARQUET,
    ),
    Case(
        31,
        "NaN",
        seventh(priced, margin=float("nan")),
        rejected("number that is not finite", "margin: NaN is not a JSON number"),
        suffixes=JSON,
    ),
    Case(
        31,
        "infinity",
        seventh(priced, margin=float("-inf")),
        rejected("number that is not finite", "margin: -Infinity is not a JSON number"),
        suffixes=JSON,
    ),
    Case(
        31,
        "larger than any float",
        marked(b"1e999", priced, "margin"),
        rejected("number that is not finite", "margin: 1e999 is larger than any float"),
        suffixes=JSON,
    ),
    Case(
        31,
        "NaN",
        seventh(priced, margin=float("nan")),
        rejected("number that is not finite", "margin: 'nan' (expected a finite number)"),
        suffixes=CSV,
    ),
    Case(
        31,
        "infinity",
        seventh(priced, margin=float("inf")),
        rejected("number that is not finite", "margin: 'inf' (expected a finite number)"),
        suffixes=CSV,
    ),
    Case(
        31,
        "NaN",
        seventh(fractional, margin=float("nan")),
        rejected("number that is not finite", "margin: nan (expected a finite number)"),
        suffixes=PARQUET,
    ),
    Case(
        31,
        "infinity",
        seventh(fractional, margin=float("inf")),
        rejected("number that is not finite", "margin: inf (expected a finite number)"),
        suffixes=PARQUET,
    ),
    Case(
        32,
        "duplicate key",
        marked(b'"a", "chosen": "b"'),
        rejected("duplicate key", "duplicate key 'chosen'"),
        suffixes=JSON,
    ),
    Case(
        32,
        "duplicate key inside a message",
        marked(b'[{"role": "user", "content": "a", "content": "b"}]', chats, "messages"),
        rejected("duplicate key", "messages[0]: duplicate key 'content'"),
        suffixes=JSON,
    ),
    Case(
        32,
        "two columns of one name",
        altered(lambda data: data.replace(b",chosen,", b",prompt,")),
        fatal("the header names 'prompt' twice", "{file}:1"),
        suffixes=CSV,
    ),
    Case(32, "two columns of one name", twins, fatal("two columns are called 'prompt'"), suffixes=PARQUET),
    Case(
        33,
        "object instead of text",
        seventh(chosen={"text": "a"}),
        rejected("wrong type", "chosen: {'text': 'a'} (expected text or messages)"),
        suffixes=JSON,
    ),
    Case(
        33,
        "object instead of a content",
        seventh(chats, messages=[*turns("user"), {"role": "assistant", "content": {"text": ["a"]}}]),
        rejected("wrong type", "messages[1].content: {'text': ['a']} (expected text)"),
        suffixes=JSON,
    ),
    Case(
        33,
        "object of a thousand characters, with control characters",
        seventh(chosen={"\x1b[2J\u202e": "x" * 1000}),
        rejected("wrong type", r"chosen: {'\x1b[2J\u202e': '" + 58 * "x" + "... (expected text or messages)"),
        suffixes=JSON,
    ),
    Case(
        33,
        "object instead of text",
        rows(*(pair(f"question {n}", {"text": "a"}, "b") for n in range(1, 21))),
        (
            "error: wrong type: 20",
            "{5}: chosen: {'text': 'a'} (expected text or messages)",
            "20 rows, 0 usable…",
            FAILED,
        ),
        suffixes=PARQUET,
    ),
)
SHAPES = (
    Case(
        34,
        "list in a .jsonl file",
        lambda suffix: save("data", suffix, compressed(encoded(".json", pairs()), suffix.partition(".jsonl.")[2])),
        fatal("begins with a list: this is a JSON array, not JSONL"),
        suffixes=(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    ),
    Case(
        34,
        "lines in a .json file",
        lambda suffix: save("data", suffix, compressed(encoded(".jsonl", pairs()), suffix.partition(".json.")[2])),
        fatal("holds one object after the other: this is JSONL"),
        suffixes=(".json", ".json.gz"),
    ),
    *(
        Case(
            35,
            f"{what} instead of an object",
            instead_of_row_7(json.dumps(value).encode()),
            rejected("not an object", f"{what}, {value!r} (expected an object)".replace("None", "null")),
            suffixes=JSON,
        )
        for what, value in (("a list", ["a", 1]), ("a string", "text"), ("a number", 5), ("null", None))
    ),
    Case(
        36,
        "blank lines",
        instead_of_row_7(b'\n  \n\r\n{"prompt": "q", "chosen": 5, "rejected": "c"}'),
        ("error: wrong type: 1", "{10}: chosen: 5 (expected text or messages)", *REJECTED),
        suffixes=(*JSON, ".jsonl.gz"),
    ),
    Case(
        36,
        "blank lines",
        altered(lambda data: data.replace(b"question 7,yes 7", b"\n\r\n\nquestion 7")),
        ("error: ragged row: 1", r"{10}: 2 fields, the header has 3: question 7,a bad answer 7\n", *REJECTED),
        suffixes=CSV,
    ),
    Case(37, "empty file", altered(lambda data: b""), fatal("holds no row"), suffixes=(*TEXT, *COMPRESSED)),
    Case(37, "blank lines only", altered(lambda data: b"\n\n"), fatal("holds no row"), suffixes=TEXT),
    Case(37, "empty list", altered(lambda data: b"[]"), fatal("holds no row"), suffixes=(".json",)),
    Case(37, "header only", altered(lambda data: data[: data.index(b"\n")]), fatal("holds no row"), suffixes=CSV),
    Case(37, "table without rows", no_rows, fatal("holds no row"), suffixes=PARQUET),
    Case(37, "no byte", content(b""), ("error: {file}: not an intact Parquet file: …",), suffixes=PARQUET),
)
FILES = (
    Case(38, "directory", lambda suffix: Path(f"data{suffix}").mkdir(), fatal("is a directory"), suffixes=EVERY),
    Case(38, "missing file", lambda suffix: None, fatal("no such file"), suffixes=EVERY),
    Case(
        38,
        "link that leads nowhere",
        lambda suffix: Path(f"data{suffix}").symlink_to("nowhere"),
        fatal("no such file: the link leads nowhere"),
        suffixes=EVERY,
    ),
    Case(
        38,
        "pipe",
        lambda suffix: os.mkfifo(f"data{suffix}"),
        fatal("is not a regular file"),
        suffixes=EVERY,
    ),
    Case(
        38,
        "no permission",
        secret,
        fatal("cannot be read: Permission denied"),
        suffixes=EVERY,
        within=unprivileged,
    ),
    Case(
        39,
        "cut gzip",
        cut_off,
        ("error: {file}: not intact .gz: Compressed file ended before the end-of-stream marker was reached…",),
        suffixes=(".jsonl.gz", ".json.gz", ".csv.gz"),
    ),
    Case(39, "cut zstd", cut_off, ("error: {file}: not intact .zst: …",), suffixes=(".jsonl.zst", ".csv.zst")),
    Case(
        39,
        "not gzip",
        lambda suffix: save("data", suffix, encoded(suffix.removesuffix(".gz"), pairs())),
        ("error: {file}: not intact .gz: Not a gzipped file…",),
        suffixes=(".jsonl.gz", ".json.gz", ".csv.gz"),
    ),
    Case(
        39,
        "not zstd",
        lambda suffix: save("data", suffix, encoded(suffix.removesuffix(".zst"), pairs())),
        ("error: {file}: not intact .zst: …",),
        suffixes=(".jsonl.zst", ".csv.zst"),
    ),
    Case(
        39,
        "gzip under another name",
        lambda suffix: save("data", suffix, encoded(f"{suffix}.gz", pairs())),
        (*fatal("holds gzip, not text"), "fix: it is gzip; end its name in .gz"),
        suffixes=TEXT,
    ),
    Case(
        39,
        "more than a thousand million bytes out of a few",
        bomb,
        fatal("expands to more than 100 times its size and 1,000,000,000 bytes"),
        suffixes=(".jsonl.gz", ".jsonl.zst", ".csv.zst"),
        marks=(pytest.mark.slow,),
    ),
    Case(
        40,
        "Parquet without the end of its footer",
        altered(lambda data: data[:-4]),
        ("error: {file}: not an intact Parquet file: Parquet magic bytes not found in footer…",),
        suffixes=PARQUET,
    ),
    Case(
        40,
        "Parquet cut in the middle",
        altered(lambda data: data[: len(data) // 2]),
        ("error: {file}: not an intact Parquet file: Parquet magic bytes not found in footer…",),
        suffixes=PARQUET,
    ),
    Case(
        40,
        "Parquet with a flipped bit",
        flipped(checksums=True),
        ("error: {file}: not an intact Parquet file: …",),
        suffixes=PARQUET,
    ),
    Case(
        40,
        "Parquet with a flipped bit, without checksums",
        flipped(checksums=False),
        ("note: no page checksums: 1", "{file}", "chosen    xes 1", FIT),
        SOUND,
        suffixes=PARQUET,
    ),
    Case(
        40,
        "Parquet with bytes for text",
        rows(*(pair(f"question {n}", b"a", "b") for n in range(20))),
        ("error: wrong type: 20", "{5}: chosen: b'a' (expected text or messages)", "20 rows, 0 usable…", FAILED),
        suffixes=PARQUET,
    ),
    Case(
        40,
        "Parquet with lists of lists for text",
        rows(*(pair(f"question {n}", [["a"], ["b"]], "b") for n in range(20))),
        (
            "error: wrong type: 20",
            "{5}: chosen[0]: ['a'] (expected an object with `role` and `content`)",
            "20 rows, 0 usable…",
            FAILED,
        ),
        suffixes=PARQUET,
    ),
    Case(
        41,
        "row with too many fields",
        altered(lambda data: data.replace(b"yes 7", b"yes, 7")),
        rejected("ragged row", r"4 fields, the header has 3: question 7,yes, 7,a bad answer 7\n"),
        suffixes=(".csv", ".csv.gz", ".csv.zst"),
    ),
    Case(
        41,
        "unclosed quote",
        altered(lambda data: data.replace(b"yes 7", b'"yes 7')),
        fatal("field 2: the quote is not closed before the file ends, and nothing after it can be read", "{7}"),
        suffixes=(".csv", ".csv.gz", ".csv.zst"),
    ),
    Case(
        41,
        "line break in quotes",
        altered(lambda data: data.replace(b"yes 3", b'"yes\n3"').replace(b"yes 7", b'yes,"\n7')),
        fatal("field 3: the quote is not closed before the file ends, and nothing after it can be read", "{file}:9"),
        suffixes=CSV,
    ),
    Case(
        41,
        "quote that is closed three rows later",
        altered(lambda data: data.replace(b"yes 7", b'"yes 7').replace(b"yes 9", b'"yes 9"')),
        (
            "error: unclosed quote: 3",
            "{7}: field 2: text after the closing quote",
            "{8}: a quote before this line is not closed where it should be",
            "{9}: a quote before this line is not closed where it should be",
            "20 rows, 17 usable…",
            "not fit for training: 3 errors, 0 warnings",
            FAILED,
        ),
        suffixes=(".csv", ".csv.gz", ".csv.zst"),
    ),
    Case(
        41,
        "a line that names the separator",
        altered(lambda data: b"sep=;\r\n" + data.replace(b",", b";")),
        ("note: other separator: 1", "data.csv:1: ';'", "20 rows, 20 usable…", FIT),
        SOUND,
        CSV,
    ),
    Case(
        41,
        "lines that end in a carriage return alone",
        altered(lambda data: data.replace(b"\n", b"\r")),
        fatal("its lines end in a carriage return alone"),
        suffixes=(".csv", ".csv.gz", ".csv.zst"),
    ),
    Case(
        41,
        "semicolons",
        altered(lambda data: data.replace(b",", b";")),
        ("note: other separator: 1", "data.csv:1: ';'", "20 rows, 20 usable…", FIT),
        SOUND,
        CSV,
    ),
    Case(
        41,
        "no header",
        altered(lambda data: data[data.index(b"\n") + 1 :]),
        ("error: data.csv:2: no format has the columns 'a bad answer 1', 'question 1', 'yes 1'",),
        suffixes=CSV,
    ),
    Case(
        41,
        "text instead of a header",
        altered(lambda data: f"q,{SHARED * 2},b\n".encode() + data),
        (f"error: data.csv:1: no header: the first line holds '{(SHARED * 2)[:76]}...",),
        suffixes=CSV,
    ),
)
SEVERAL = (
    Case(
        42,
        "files with other columns",
        both(pairs(3), completions(3)),
        (
            "error: {other 1}: the columns differ from those of {1}: `chosen`, `completion`, `rejected` "
            "only in one of them",
        ),
        suffixes=EVERY,
        arguments=("doctor", "*{suffix}"),
    ),
    Case(
        42,
        "files with other types",
        both(pairs(3), [pair(turns("user"), turns("assistant"), turns("assistant", text="b"))]),
        ("error: mixed layouts: 1", "{other 1}: chosen: [{'…", "4 rows, 3 usable…", UNFIT, FAILED_BOTH),
        suffixes=NESTED,
        arguments=("doctor", "*{suffix}"),
    ),
    Case(
        43,
        "prompt of a test set",
        both(pairs(), [{"prompt": "question 7"}]),
        ("error: prompt on both sides: 1", "{7} and {other 1}: in other{suffix}", UNFIT, FAILED),
        suffixes=EVERY,
        arguments=("doctor", "{file}", "--against", "other{suffix}"),
    ),
    Case(
        43,
        "prompt of a test set in other case",
        both(pairs(), [{"prompt": "Question  7?"}]),
        (
            "warning: prompt on both sides but for case and punctuation: 1",
            "{7} and {other 1}: in other{suffix}",
            ONE_WARNING,
        ),
        SOUND,
        EVERY,
        arguments=("doctor", "{file}", "--against", "other{suffix}"),
    ),
    Case(
        43,
        "thirteen words of a test set",
        both([*pairs(6), pair(f"Tell me {SHARED}.", "a", "b")], [{"prompt": f"Say, {SHARED}?"}]),
        ("warning: 13 words in a row on both sides: 1", "{7} and {other 1}: in other{suffix}", ONE_WARNING),
        SOUND,
        arguments=("doctor", "{file}", "--against", "other{suffix}"),
    ),
    Case(
        44,
        "prompt of the evaluation suite",
        suite,
        ("error: prompt on both sides: 1", "{7} and world:prompts:1: in world:prompts", UNFIT, FAILED),
        arguments=("doctor", "{file}", "--against", "world:prompts"),
    ),
    Case(
        44,
        "prompt of the evaluation stage in other case",
        configuration,
        (
            "warning: prompt on both sides but for case and punctuation: 1",
            "{7} and {other 1}: in other{suffix}",
        ),
        SOUND,
        EVERY,
        arguments=("doctor", "run.yaml"),
    ),
    Case(
        45,
        "preferred both ways",
        rows(*pairs(6), pair("question 3", "a bad answer 3", "yes 3")),
        ("warning: contradictory pairs: 1", "{3} and {7}", ONE_WARNING),
        SOUND,
    ),
    Case(
        45,
        "cycle",
        rows(*(pair("q", *each) for each in ("ab", "bc", "xy", "ca"))),
        ("warning: preferences in a cycle: 1", "{1}, {2} and {4}", ONE_WARNING),
        SOUND,
    ),
    Case(
        46,
        "longer responses win",
        rows(*(pair(f"question {n}", f"a longer answer {n}", "no") for n in range(40))),
        (
            "warning: length bias: 1",
            "{file}: the longer response wins in 100.0% of the pairs",
            "the better response is +15…",
            ONE_WARNING,
        ),
        SOUND,
    ),
    Case(
        46,
        "mixed languages",
        rows(*pairs(6), pair("вопрос", "да", "да нет"), pair("質問", "はい", "いいえ")),
        ("rows by script: Latin 6, …", "8 rows, 8 usable…", FIT),
        SOUND,
    ),
    Case(
        47,
        "number as text",
        seventh(priced, margin="7.5"),
        warned("number written as text", "margin: '7.5'"),
        SOUND,
        JSON,
    ),
    Case(
        47,
        "numbers as text",
        rows(*({**each, "margin": "7.5"} for each in pairs())),
        (
            "warning: number written as text: 20",
            "{1}: margin: '7.5'",
            "20 rows, 20 usable…",
            "fit for training, with 20 warnings",
        ),
        SOUND,
        PARQUET,
    ),
    Case(
        47,
        "numbers in a file that has only text",
        seventh(priced, margin="7.5"),
        ("20 rows, 20 usable…", FIT),
        SOUND,
        CSV,
    ),
    *(
        Case(
            47,
            f"the word {word.strip()}",
            seventh(chosen=word),
            warned("null written as text", f"chosen: {word!r}"),
            SOUND,
            EVERY,
        )
        for word in ("None", "null", " nan")
    ),
    Case(
        48,
        "template that does not end a turn",
        endless,
        ("error: the chat template ends the assistant's turn with '\\n', not with a control token",),
        NO_MODEL,
        suffixes=LINES,
        arguments=("doctor", "{file}", "--tokenizer", "endless"),
    ),
    Case(
        48,
        "end token inside a text",
        seventh(chats, messages=turns("user", "assistant", text="before <|im_end|> after")),
        warned("control tokens in content", "prompt: before <|im_end|> after (character 8)"),
        SOUND,
        NESTED,
        arguments=("doctor", "{file}", "--tokenizer", "{model}"),
    ),
    Case(
        49,
        "file that grows while it is read",
        growing,
        fatal("changed while it was read"),
        arguments=("doctor", "{file}", "format=grow_{kind}:adapt", "--adapter", "grow_{kind}:adapt"),
    ),
    Case(
        50,
        "line break in the path",
        named("a\nb"),
        rejected("NUL character", r"chosen: 'a\x00b' (NUL at character 2)"),
        file=r"a\nb",
        arguments=("doctor", "a\nb{suffix}"),
    ),
    Case(
        50,
        "escape sequences in the path",
        named("\x1b[2J\u202e"),
        rejected("NUL character", r"chosen: 'a\x00b' (NUL at character 2)"),
        file=r"\x1b[2J\u202e",
        arguments=("doctor", "\x1b[2J\u202e{suffix}"),
    ),
    Case(
        50,
        "letters of a glob in the path",
        named("[ab]*"),
        rejected("NUL character", r"chosen: 'a\x00b' (NUL at character 2)"),
        file="[ab]*",
        arguments=("doctor", "[ab]*{suffix}"),
    ),
    Case(
        50,
        "decomposed accent in the path",
        named("cafe\u0301"),
        rejected("NUL character", r"chosen: 'a\x00b' (NUL at character 2)"),
        file="cafe\u0301",
        arguments=("doctor", "cafe\u0301{suffix}"),
    ),
    Case(
        50,
        "accent of another normal form in the path",
        named("cafe\u0301"),
        (*fatal("no such file"), r"fix: the name is there in another Unicode form: 'cafe\u0301{suffix}'"),
        file="caf\u00e9",
        arguments=("doctor", "caf\u00e9{suffix}"),
    ),
    Case(
        50,
        "NUL in the path",
        seventh(),
        fatal("cannot be read: embedded null byte"),
        file=r"a\x00b",
        arguments=("doctor", "a\0b{suffix}"),
    ),
    Case(
        50,
        "path of 300 bytes",
        named(LONG),
        ("...{tail}: chosen: 'a\\x00b' (NUL at character 2)", "error: NUL character: 1", *REJECTED[:2]),
        file=LONG,
        arguments=("doctor", f"{LONG}{{suffix}}"),
    ),
    Case(
        50,
        "path of 4,095 bytes",
        named(longest(".jsonl")),
        ("error: NUL character: 1", *REJECTED[:2]),
        suffixes=LINES,
        arguments=("doctor", longest(".jsonl") + ".jsonl"),
    ),
    Case(
        50,
        "path of 4,096 bytes",
        seventh(),
        ("error: dddddddddd…", "fix: check the name and the permissions"),
        suffixes=LINES,
        arguments=("doctor", "d" + longest(".jsonl") + ".jsonl"),
    ),
)
DOCUMENTS = (
    Case(
        1,
        "invalid UTF-8 byte",
        document(b"one\ntwo\ncaf\xff\n"),
        ("error: not UTF-8: 1", "{file}:3: byte 4: not UTF-8 (0xff)", *REFUSED),
        suffixes=PLAIN,
    ),
    Case(
        2,
        "byte order mark",
        document(b"\xef\xbb\xbfone\ntwo\n"),
        ("note: byte order mark: 1", "{file}", "1 row, 1 usable…", FIT),
        SOUND,
        PLAIN,
    ),
    Case(3, "UTF-16", document("one".encode("utf-16")), fatal("looks like UTF-16"), suffixes=PLAIN),
    Case(
        5,
        "document cut inside a character",
        document("one\ntwo é".encode()[:-1]),
        ("error: cut short: 1", "{file}:2: the file ends inside a character", *REFUSED),
        suffixes=PLAIN,
    ),
    Case(
        16,
        "white space only",
        document(b" \n\n"),
        ("dropped: empty text: 1", r"{file}:1: text: ' \n\n' (empty)", "1 row, 0 usable…", NO_ROW, FAILED),
        suffixes=PLAIN,
    ),
    Case(
        22,
        "document longer than max_chars",
        document(b"one\ntwo\n" * 100),
        ("error: row too large: 1", "{file}:3: 800 characters, limit 10 (max_chars)", *REFUSED),
        suffixes=PLAIN,
        arguments=("doctor", "{file}", "max_chars=10"),
    ),
    Case(
        24,
        "NUL",
        document(b"one\na\0b\nthree\n"),
        ("error: NUL character: 1", r"{file}:2: 'a\x00b' (NUL at character 2)", *REFUSED),
        suffixes=PLAIN,
    ),
    Case(
        37,
        "empty document",
        document(b""),
        ("dropped: empty text: 1", "{file}:1: text: '' (empty)", "1 row, 0 usable…", NO_ROW, FAILED),
        suffixes=PLAIN,
    ),
    Case(38, "missing file", lambda suffix: None, fatal("no such file"), suffixes=PLAIN),
    Case(38, "pipe", lambda suffix: os.mkfifo(f"data{suffix}"), fatal("is not a regular file"), suffixes=PLAIN),
    Case(
        39,
        "cut gzip",
        lambda suffix: save("data", suffix, gzip.compress(b"one\ntwo\n")[:-9]),
        ("error: {file}: not intact .gz: Compressed file ended before the end-of-stream marker was reached…",),
        suffixes=(".txt.gz",),
    ),
    Case(
        39,
        "gzip under another name",
        lambda suffix: save("data", suffix, gzip.compress(b"one\ntwo\n")),
        (*fatal("holds gzip, not text"), "fix: it is gzip; end its name in .gz"),
        suffixes=(".txt",),
    ),
)
CASES = (*ENCODING, *FIELDS, *DIALOGUES, *CHARACTERS, *VALUES, *SHAPES, *FILES, *SEVERAL, *DOCUMENTS)


def parameters() -> list[Any]:
    return [
        pytest.param(case, suffix, id=f"{case.number:02} {case.name} [{suffix[1:]}]", marks=case.marks)
        for case in CASES
        for suffix in case.suffixes
    ]


def filled(line: str, case: Case, suffix: str, model: Path) -> str:
    """A line or an argument with its names and places."""

    def at(match: re.Match[str]) -> str:
        return place(suffix, int(match[2]), match[1] or case.file)

    line = line.replace("{tail}", place(suffix, 7, case.file)[3 - LONGEST :])
    line = re.sub(r"\{(?:(\w+) )?(\d+)\}", at, line)
    names = {"file": case.file + suffix, "suffix": suffix, "kind": suffix[1:], "model": str(model)}
    return re.sub(r"\{(file|suffix|kind|model)\}", lambda match: names[match[1]], line)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template writes `<|im_start|>` and `<|im_end|>` around turns; its tokenizer also has `~~END~~`."""
    return save_model(tmp_path_factory.mktemp("models") / "chatml")


def save_model(directory: Path) -> Path:
    tiny.save_model(directory, "qwen2", ["question and answer"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_tokens([AddedToken("~~END~~", special=True)], special_tokens=True)
    tokenizer.save_pretrained(directory)
    return directory


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
    monkeypatch.syspath_prepend(tmp_path)
    case.write(suffix)
    capsys.readouterr()
    with case.within():
        code = cli.execute(cli.app, [filled(each, case, suffix, model) for each in case.arguments])
    printed = "".join(capsys.readouterr())
    check(case, suffix, model, printed)
    assert code == case.code


def check(case: Case, suffix: str, model: Path, printed: str) -> None:
    """See that all that shall be said is printed, no other finding, and nothing that a terminal would interpret."""
    lines = [line.strip() for line in printed.splitlines()]
    expected = [filled(line, case, suffix, model) for line in case.says]
    for line in expected:
        beginning = line.removesuffix("…")
        assert any(each.startswith(beginning) if line != beginning else each == line for each in lines), printed
    assert [line for line in lines if FINDING.fullmatch(line) and line not in expected] == []
    assert not UNPRINTABLE.search(printed)


@pytest.mark.parametrize(
    ("case", "suffix"),
    [each for each in parameters() if each.id in IN_A_PROCESS],
)
def test_it_is_named_in_a_process_of_its_own(
    case: Case, suffix: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case.write(suffix)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMMAND, *(filled(each, case, suffix, model) for each in case.arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    check(case, suffix, model, done.stdout + done.stderr)
    assert done.returncode == case.code


def test_the_list_is_complete() -> None:
    assert sorted({case.number for case in CASES}) == list(range(1, 51))
    names = [each.id for each in parameters()]
    assert len(set(names)) == len(names)
    assert set(IN_A_PROCESS) <= set(names)
