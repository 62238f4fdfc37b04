"""Reading: every fault is named with its place, every usable row arrives, and the sides never mix."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import read
from data.read import check, fingerprint, load
from data.schema import Conversation, Message, Preference, Prompt, Text
from data.split import is_held_out
from pipeline.config import DataSource
from pipeline.errors import DataError

DATA = Path(os.environ.get("BATON_DATA", Path(__file__).parents[1] / "../shared/data"))
ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(40)]
PREFERENCE = ("preference",)


def source(path: Path | str, **settings: Any) -> DataSource:
    return DataSource(source=str(path), **settings)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_jsonl(path: Path) -> Path:
    return write(path, lines(ROWS))


def write_gzip(path: Path) -> Path:
    return write(path, gzip.compress(lines(ROWS)))


def write_parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path, row_group_size=7, write_page_checksum=True, compression="none"
    )
    return path


WRITERS: list[tuple[str, Callable[[Path], Path]]] = [
    ("a.jsonl", write_jsonl),
    ("a.jsonl.gz", write_gzip),
    ("a.parquet", write_parquet),
]


@pytest.mark.parametrize(("name", "writer"), WRITERS)
def test_every_row_arrives_once_on_the_side_of_its_prompt(
    tmp_path: Path, name: str, writer: Callable[[Path], Path]
) -> None:
    path = writer(tmp_path / name)
    loaded = load(source(path, held_out=0.5), PREFERENCE)
    assert (loaded.kind, loaded.format, loaded.dropped) == ("preference", "explicit", {})
    rows = sorted(loaded.train + loaded.held_out, key=lambda row: int(row.origin.split()[-1].split(":")[-1]))
    expected = [Preference((Message("user", row["prompt"]),), (row["chosen"], row["rejected"])) for row in ROWS]
    assert [(row.prompt, row.responses) for row in rows if isinstance(row, Preference)] == [
        (row.prompt, row.responses) for row in expected
    ]
    place = "row {}" if name.endswith("parquet") else "{}"
    assert [row.origin for row in rows] == [f"{path}:{place.format(number)}" for number in range(1, 41)]
    assert all(is_held_out(row, 0.5) for row in loaded.held_out)
    assert not any(is_held_out(row, 0.5) for row in loaded.train)
    assert loaded.held_out


@pytest.mark.parametrize(("name", "writer"), WRITERS)
def test_the_fingerprint_is_the_sha256_of_the_bytes(tmp_path: Path, name: str, writer: Callable[[Path], Path]) -> None:
    path = writer(tmp_path / name)
    assert fingerprint(source(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load(source(path), PREFERENCE).digest == fingerprint(source(path))


@pytest.mark.parametrize(("name", "writer"), WRITERS)
def test_rows_limits_what_is_read(tmp_path: Path, name: str, writer: Callable[[Path], Path]) -> None:
    loaded = load(source(writer(tmp_path / name), rows=5, held_out=0.0), PREFERENCE)
    assert len(loaded.train) == 5
    assert not loaded.held_out


GOOD = lines(ROWS[:2])
BROKEN: list[tuple[str, bytes, str, str]] = [
    ("cut.jsonl", GOOD + b'{"prompt": "a", "cho', ":3", "broken JSON at column 17"),
    ("comma.jsonl", GOOD + b'{"prompt": "a",, "b": 1}\n', ":3", "broken JSON at column 16"),
    ("bytes.jsonl", GOOD + b'{"prompt": "\xff"}\n', ":3", "byte 13: not UTF-8 (0xff)"),
    ("utf16.jsonl", '{"prompt": "a"}'.encode("utf-16"), ":1", "UTF-16"),
    ("twice.jsonl", GOOD + b'{"prompt": "a", "prompt": "b"}\n', ":3", "duplicate key 'prompt'"),
    ("nan.jsonl", GOOD + b'{"prompt": NaN}\n', ":3", "NaN is not a JSON number"),
    ("infinity.jsonl", GOOD + b'{"prompt": -Infinity}\n', ":3", "-Infinity is not a JSON number"),
    ("list.jsonl", b'[{"prompt": "a"}]', ":1", "}] (expected an object)"),
    ("string.jsonl", GOOD + b'"hello"\n', ":3", "'hello' (expected an object)"),
    ("deep.jsonl", GOOD + b"[" * 200_000 + b"\n", ":3", "JSON"),
    ("long.jsonl", GOOD + b'{"prompt": ' + b"1" * 5000 + b"}\n", ":3", "JSON"),
    ("column.jsonl", GOOD + b'{"prompt": "a", "chosen": "b"}\n', ":3", "no column `rejected`"),
    ("null.jsonl", GOOD + b'{"prompt": "a", "chosen": null, "rejected": "c"}\n', ":3", "chosen: null"),
    ("surrogate.jsonl", GOOD + b'{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}\n', ":3", "surrogate"),
    ("blank.jsonl", b"\n\r\n" + GOOD + b"\n \n5\n", ":7", "5 (expected an object)"),
    ("empty.jsonl", b"", "", "holds no row"),
    ("white.jsonl", b"\n \n", "", "holds no row"),
    ("empty.jsonl.gz", b"", "", "holds no row"),
    ("plain.jsonl.gz", GOOD, ":1", "not intact gzip"),
    ("short.jsonl.gz", gzip.compress(lines(ROWS))[:30], ":1", "not intact gzip"),
    ("plain.parquet", GOOD, "", "not an intact Parquet file"),
    ("empty.parquet", b"", "", "not an intact Parquet file"),
    ("table.csv", b"prompt,chosen\n", "", "not a kind of file"),
]


@pytest.mark.parametrize(("name", "content", "place", "words"), BROKEN, ids=[each[0] for each in BROKEN])
@pytest.mark.parametrize("reader", [check, load])
def test_a_broken_file_is_refused_with_its_place(
    tmp_path: Path, reader: Callable[..., Any], name: str, content: bytes, place: str, words: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        reader(source(path), PREFERENCE)
    assert caught.value.where.startswith(f"{path}{place}")
    assert words in caught.value.what
    assert caught.value.hint
    assert len(caught.value.what) < 300
    assert caught.value.what.isprintable()


def test_gzip_that_is_cut_or_has_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    intact = gzip.compress(lines(ROWS))
    flipped = bytearray(intact)
    flipped[-6] ^= 1
    for content in (intact[:-12], bytes(flipped)):
        with pytest.raises(DataError, match="not intact gzip"):
            load(source(write(tmp_path / "a.jsonl.gz", content)), PREFERENCE)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    intact = write_parquet(tmp_path / "a.parquet").read_bytes()
    flipped = bytearray(intact)
    flipped[intact.index(b"Question 20?") + 3] ^= 1
    for content in (intact[: len(intact) // 2], intact[:-3], bytes(flipped)):
        path = write(tmp_path / "damaged.parquet", content)
        with pytest.raises(DataError, match="not an intact Parquet file") as caught:
            load(source(path), PREFERENCE)
        assert caught.value.where.startswith(str(path))


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n")
    loaded = load(source(write(tmp_path / "a.jsonl", content), held_out=0.0), PREFERENCE)
    assert len(loaded.train) == len(ROWS)


@pytest.mark.parametrize("act", [fingerprint, lambda it: check(it, PREFERENCE), lambda it: load(it, PREFERENCE)])
def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path, act: Callable[[DataSource], object]) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    expected = {
        "pipe.jsonl": "not a regular file",
        "folder.jsonl": "is a directory",
        "dangling.jsonl": "no such file",
        "absent.jsonl": "no such file",
        "x" * 300 + ".jsonl": "cannot be read",
    }
    for name, words in expected.items():
        with pytest.raises(DataError, match=words) as caught:
            act(source(tmp_path / name))
        assert caught.value.hint


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")

    def convert_and_append(row: Any, *arguments: Any) -> Any:
        with path.open("ab") as stream:
            stream.write(b"\n")
        return row

    monkeypatch.setattr(read, "convert", convert_and_append)
    with pytest.raises(DataError, match="changed while it was read"):
        load(source(path, rows=3), PREFERENCE)


def test_unusable_rows_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        *ROWS,
        {"prompt": "a", "chosen": "", "rejected": "b"},
    ]
    loaded = load(source(write(tmp_path / "a.jsonl", lines(rows))), PREFERENCE)
    assert loaded.dropped == {"empty response": 1, "equal responses": 1}
    assert len(loaded.train) + len(loaded.held_out) == len(ROWS)


def test_no_usable_row_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3))
    with pytest.raises(DataError, match="no usable row; dropped 3: equal responses"):
        load(source(path), PREFERENCE)


PROMPT = (Message("user", "Question 0?"),)
SPOKEN = (*PROMPT, Message("assistant", "Yes."))


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("preference", Preference(PROMPT, ("Yes.", "No."))),
        ("conversation", Conversation(SPOKEN)),
        ("prompt", Prompt(PROMPT, {"answer": "Yes."})),
        ("text", Text("user: Question 0?\n\nassistant: Yes.")),
    ],
)
def test_preferences_are_read_as_every_simpler_kind(tmp_path: Path, kind: str, row: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    loaded = load(source(path, held_out=0.0), (kind,))
    assert loaded.kind == kind
    assert len(loaded.train) == len(ROWS)
    first = loaded.train[0]
    assert type(first) is type(row)
    assert vars(first) | {"origin": ""} == vars(row)


def test_the_first_kind_that_the_rows_can_serve_as_wins(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    kinds = ("prompt", "conversation", "preference")
    assert load(source(path), kinds).kind == "prompt"
    assert load(source(path), tuple(reversed(kinds))).kind == "preference"


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"text": "a"}, ("conversation",)),
        ({"prompt": "a"}, ("text", "conversation")),
        ({"prompt": "a", "completion": "b"}, ("preference",)),
    ],
)
def test_rows_that_cannot_serve_say_what_they_are_and_what_is_needed(
    tmp_path: Path, row: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    path = write(tmp_path / "a.jsonl", lines([row]))
    for reader in (check, load):
        with pytest.raises(DataError) as caught:
            reader(source(path), kinds)
        assert "the rows are of kind" in caught.value.what
        assert " or ".join(kinds) in caught.value.what
        assert caught.value.where == f"{path}:1"


def test_a_prompt_is_on_one_side_whatever_the_rows_are_read_as(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    sides = [
        {row.origin for row in load(source(path, held_out=0.3), (kind,)).held_out}
        for kind in ("preference", "conversation", "prompt", "text")
    ]
    assert sides[0]
    assert all(side == sides[0] for side in sides)


def test_hh_dialogues_become_text_in_their_own_form(tmp_path: Path) -> None:
    dialogue = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Where is Ann?\n\nAssistant:"
    row = {"chosen": f"{dialogue} In Rome.", "rejected": f"{dialogue} Why?"}
    loaded = load(source(write(tmp_path / "a.jsonl", lines([row])), held_out=0.0), ("text",))
    assert loaded.train == (Text(row["chosen"], f"{tmp_path}/a.jsonl:1"),)


@pytest.mark.parametrize(
    ("name", "kinds", "total", "dropped"),
    [
        ("hh-rlhf/harmless-base-test.jsonl.gz", ("preference",), 2303, 9),
        ("hh-rlhf/harmless-base-test.jsonl.gz", ("prompt",), 2303, 9),
        ("gsm8k/train.jsonl", ("conversation",), 7473, 0),
        ("gsm8k/test.jsonl", ("prompt", "conversation"), 1319, 0),
    ],
)
def test_real_files_are_read_whole(name: str, kinds: tuple[str, ...], total: int, dropped: int) -> None:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}: set BATON_DATA to the folder with {name}")
    check(source(path), kinds)
    loaded = load(source(path), kinds)
    assert loaded.kind == kinds[0]
    assert len(loaded.train) + len(loaded.held_out) == total
    assert sum(loaded.dropped.values()) == dropped
    train, held_out = (
        {row.prompt for row in side if isinstance(row, Preference | Prompt)} for side in (loaded.train, loaded.held_out)
    )
    assert not train & held_out


@pytest.mark.parametrize("part", ["corpus", "demonstrations", "preferences", "prompts"])
def test_the_world_is_one_more_source(part: str) -> None:
    kind = {
        "corpus": "text",
        "demonstrations": "conversation",
        "preferences": "preference",
        "prompts": "prompt",
    }[part]
    world = source(f"world:{part}", rows=50)
    check(world, (kind,))
    loaded = load(world, (kind,))
    assert (loaded.kind, loaded.format) == (kind, "world")
    assert len(loaded.train) + len(loaded.held_out) == 50
    assert all(row.origin for row in loaded.train)
    others = [
        source(f"world:{part}", rows=51),
        source(f"world:{part}", rows=50, seed=1),
        source(f"world:{part}"),
    ]
    assert len({fingerprint(each) for each in [world, *others]}) == 4


@pytest.mark.parametrize("act", [fingerprint, lambda it: check(it, ("text",))])
@pytest.mark.parametrize("name", ["world:moon", "hub:nothing", "hub:owner/name", "hub:owner/name@", "hub:../a/b@main"])
def test_a_malformed_reference_is_refused(act: Callable[[DataSource], object], name: str) -> None:
    with pytest.raises(DataError) as caught:
        act(source(name))
    assert caught.value.hint


def test_a_hub_fingerprint_is_of_name_revision_and_split() -> None:
    references = [
        ("hub:a/b@main", "train"),
        ("hub:a/b@main", "test"),
        ("hub:a/b@v2", "train"),
        ("hub:a/c@main", "train"),
    ]
    assert len({fingerprint(source(name, split=split)) for name, split in references}) == 4


PREPARE_CACHE = """
import datasets, sys
from datasets.arrow_writer import ArrowWriter
from pathlib import Path

folder = Path(sys.argv[1]) / "datasets" / "someone___pairs" / "default" / "0.0.0" / ("a" * 40)
folder.mkdir(parents=True)
columns = ("prompt", "chosen", "rejected")
features = datasets.Features({name: datasets.Value("string") for name in columns})
with ArrowWriter(path=str(folder / "pairs-train.arrow"), features=features) as writer:
    for number in range(3):
        writer.write({"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."})
    rows, size = writer.finalize()
split = datasets.SplitInfo(name="train", num_bytes=size, num_examples=rows, dataset_name="pairs")
datasets.DatasetInfo(
    builder_name="json", dataset_name="pairs", config_name="default", version="0.0.0",
    features=features, splits=datasets.SplitDict({"train": split}),
).write_to_directory(str(folder))
"""

LOAD_FROM_CACHE = """
import json, sys
from data.read import load
from pipeline.config import DataSource
from pipeline.errors import DataError

for name, split in json.loads(sys.argv[1]):
    try:
        loaded = load(DataSource(source=name, split=split, held_out=0.0), ("preference",))
        print(json.dumps([[row.origin, row.prompt[0].content, *row.responses] for row in loaded.train]))
    except DataError as error:
        print(json.dumps([error.where, error.what]))
"""


def test_hub_datasets_come_through_datasets_at_the_revision_asked_for(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }

    def run(script: str, *arguments: str) -> list[str]:
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    run(PREPARE_CACHE, str(tmp_path))
    cached, other = (f"hub:someone/pairs@{letter * 40}" for letter in "ab")
    wanted = [(cached, "train"), (other, "train"), (cached, "test"), ("hub:someone/else@main", "train")]
    rows, wrong_revision, wrong_split, wrong_name = map(json.loads, run(LOAD_FROM_CACHE, json.dumps(wanted)))
    assert rows == [[f"{cached}:row {number + 1}", f"Question {number}?", "Yes.", "No."] for number in range(3)]
    assert wrong_revision == [other, f"the cache holds revision {'a' * 40}"]
    assert wrong_split[0] == cached
    assert "test" in wrong_split[1]
    assert wrong_name[0] == "hub:someone/else@main"


def test_checking_and_fingerprinting_import_no_heavy_library(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from data.read import check, fingerprint\n"
        "from pipeline.config import DataSource\n"
        "for name in sys.argv[1:]:\n"
        "    it = DataSource(source=name)\n"
        "    fingerprint(it), check(it, ('preference',))\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))\n"
    )
    names = [str(writer(tmp_path / name)) for name, writer in WRITERS] + ["world:preferences", "hub:a/b@main"]
    command = [sys.executable, "-c", script, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
