"""Sources: which files are read, how they are opened, which columns they have, and that reading streams."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPOSITORY

from data import findings as kinds
from data.findings import BadRow, Findings
from data.sources import Located, files, fingerprint, records
from pipeline.config import DataSource
from pipeline.errors import DataError

ROWS: list[dict[str, Any]] = [{"prompt": f"Question {number}?", "chosen": "Yes."} for number in range(40)]


def source(path: Path | str | list[str], **settings: Any) -> DataSource:
    return DataSource(source=path if isinstance(path, list) else str(path), **settings)


def read(path: Path | str | list[str], **settings: Any) -> list[Located | BadRow]:
    return list(records(source(path, **settings), Findings()))


def rows(found: list[Located | BadRow]) -> list[Any]:
    return [each.record for each in found if isinstance(each, Located)]


def jsonl(data: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in data)


def csv_text(data: list[dict[str, Any]]) -> bytes:
    lines = [",".join(data[0]), *(",".join(row.values()) for row in data)]
    return "\n".join(lines).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


def write_parquet(path: Path, data: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), path, write_page_checksum=True)


TEXTS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": jsonl,
    "a.json": lambda data: json.dumps(data).encode(),
    "a.csv": csv_text,
    "a.tsv": lambda data: csv_text(data).replace(b",", b"\t"),
}
CODINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
NAMES = [f"{name}{coding}" for name in TEXTS for coding in CODINGS] + ["a.parquet"]


def write(folder: Path, name: str, data: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        write_parquet(path, data)
        return path
    coding = path.suffix if path.suffix in CODINGS else ""
    path.write_bytes(CODINGS[coding](TEXTS[name.removesuffix(coding)](data)))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_every_kind_of_file_arrives(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    assert rows(read(path)) == ROWS
    assert rows(read(path, rows=3)) == ROWS[:3]
    assert fingerprint(source(path)) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a.md", "a", "a.txt.xz", "a.parquet.gz", "a.gz", "a.jsonl.xz", ".jsonl"])
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(jsonl(ROWS))
    with pytest.raises(DataError, match="not a kind of file that is read") as caught:
        read(tmp_path / name)
    assert ".jsonl" in caught.value.hint


def test_a_kind_in_capitals_is_known(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(jsonl(ROWS)))
    assert rows(read(tmp_path / "A.JSONL.GZ")) == ROWS


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".gz", ".zst"))])
def test_every_cut_of_a_compressed_file_is_refused(tmp_path: Path, name: str) -> None:
    intact = write(tmp_path, name).read_bytes()
    path = tmp_path / f"cut-{name}"
    for size in range(1, len(intact)):
        path.write_bytes(intact[:size])
        with pytest.raises(DataError, match="not intact") as caught:
            read(path)
        assert caught.value.where == str(path)
        assert caught.value.hint


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.zst"])
def test_what_only_claims_to_be_compressed_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(jsonl(ROWS))
    with pytest.raises(DataError, match="not intact"):
        read(tmp_path / name)


def test_flipped_bits_of_gzip_never_change_a_row(tmp_path: Path) -> None:
    intact = gzip.compress(jsonl(ROWS))
    path = tmp_path / "a.jsonl.gz"
    for place in range(10, len(intact)):
        flipped = bytearray(intact)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="not intact"):
            read(path)


@pytest.mark.parametrize("coding", [".gz", ".zst"])
def test_compressed_files_can_be_joined(tmp_path: Path, coding: str) -> None:
    path = tmp_path / f"a.jsonl{coding}"
    path.write_bytes(CODINGS[coding](jsonl(ROWS[:7])) + CODINGS[coding](jsonl(ROWS[7:])))
    assert rows(read(path)) == ROWS


@pytest.mark.parametrize("coding", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_that_expands_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coding: str, name: str
) -> None:
    monkeypatch.setattr(files, "SUSPICIOUS_SIZE", 3_000_000)
    path = tmp_path / f"{name}{coding}"
    start = {"a.jsonl": b"", "a.json": b"[", "a.csv": b"a,b\n"}[name]
    path.write_bytes(CODINGS[coding](start + b" " * 30_000_000))
    tracemalloc.start()
    with pytest.raises(DataError, match="expands to more than 100 times its size") as caught:
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.where == str(path)
    assert peak < 10_000_000


def test_well_compressed_data_is_not_mistaken_for_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(ROWS[:1] * 100_000)))
    assert len(read(path)) == 100_000


ACTS = [
    pytest.param(fingerprint, id="fingerprint"),
    pytest.param(lambda it: list(records(it, Findings())), id="records"),
]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.zst"])
def test_what_is_not_a_file_is_refused_without_waiting(
    tmp_path: Path, act: Callable[[DataSource], object], suffix: str
) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"dangling{suffix}").symlink_to(tmp_path / "nowhere")
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    expected = {
        "pipe": "not a regular file",
        "folder": "is a directory",
        "dangling": "no such file: the link leads nowhere",
        "loop": "cannot be read",
        "device": "not a regular file",
        "absent": "no such file",
        "x" * 300: "File name too long",
    }
    for name, words in expected.items():
        with pytest.raises(DataError, match=words) as caught:
            act(source(tmp_path / f"{name}{suffix}"))
        assert caught.value.where == str(tmp_path / f"{name}{suffix}")
        assert caught.value.hint


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".json", ".parquet"])
def test_a_file_whose_reading_fails_is_named(tmp_path: Path, act: Callable[[DataSource], object], suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.symlink_to("/proc/self/mem")  # a regular file; its first page cannot be read
    with pytest.raises(DataError, match=r"cannot be read|not an intact Parquet file") as caught:
        act(source(path))
    assert caught.value.where == str(path)


def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    for act in (fingerprint, lambda it: list(records(it, Findings()))):
        with pytest.raises(DataError, match="Permission denied"):
            act(source(path))


@pytest.mark.parametrize("act", ACTS)
def test_control_characters_in_paths_are_escaped(tmp_path: Path, act: Callable[[DataSource], object]) -> None:
    for name in ("a\nb.jsonl", "a\x1b[31m.csv", "a\u202eb.parquet", "a\udcff.json"):
        with pytest.raises(DataError, match=r"no such file|no file matches") as caught:
            act(source(tmp_path / name))
        assert str(caught.value.where).isprintable()
    for name in ("a\0b.jsonl", "a\0*.jsonl", "\0"):
        with pytest.raises(DataError) as caught:
            act(source(name))
        assert "\\x00" in caught.value.where


def test_a_path_with_a_line_break_is_read_and_escaped_in_origins(tmp_path: Path) -> None:
    (tmp_path / "a\nb.jsonl").write_bytes(jsonl(ROWS) + b"5\n")
    found = read(tmp_path / "a\nb.jsonl")
    assert rows(found) == ROWS
    assert isinstance(found[0], Located)
    assert found[0].origin == f"{tmp_path}/a\\nb.jsonl:1"
    assert isinstance(found[-1], BadRow)
    assert found[-1].where == f"{tmp_path}/a\\nb.jsonl:41"


def test_a_path_of_4094_bytes_is_read_and_a_longer_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.jsonl")
    (tmp_path / "x").mkdir()
    (tmp_path / "xyz").mkdir()
    longest = "x/../" * 816 + "xyz/../a.jsonl"
    assert len(longest) == 4094
    assert rows(read(longest)) == ROWS
    with pytest.raises(DataError, match="File name too long"):
        read(f"x/../{longest}")


def test_a_name_in_another_unicode_form_is_pointed_out(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.jsonl") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).write_bytes(jsonl(ROWS))
    assert rows(read(tmp_path / decomposed)) == ROWS
    with pytest.raises(DataError, match="no such file") as caught:
        read(tmp_path / composed)
    assert "another Unicode form: 'e\\u0301.jsonl'" in caught.value.hint


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(["b.jsonl", "a.jsonl", "deep/c.jsonl", "deep/er/d.jsonl", "e.csv"]):
        content = ROWS[number * 8 : number * 8 + 8]
        (tmp_path / name).write_bytes(csv_text(content) if name.endswith("csv") else jsonl(content))
    (tmp_path / ".hidden.jsonl").write_bytes(b"?")
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "numbers"),
    [
        ("*.jsonl", [1, 0]),
        ("**/*.jsonl", [1, 0, 2, 3]),
        ("**", [1, 0, 2, 3, 4]),
        ("?.csv", [4]),
        ("[ab].jsonl", [1, 0]),
        ("[!a].jsonl", [0]),
        (["e.csv", "*.jsonl", "deep/**/d.jsonl"], [4, 1, 0, 3]),
    ],
)
def test_globs_are_read_in_alphabetical_order_and_lists_in_theirs(
    shards: Path, patterns: str | list[str], numbers: list[int]
) -> None:
    named = [f"{shards}/{each}" for each in ([patterns] if isinstance(patterns, str) else patterns)]
    found = read(named if isinstance(patterns, list) else named[0])
    assert rows(found) == [row for number in numbers for row in ROWS[number * 8 : number * 8 + 8]]


def test_rows_limits_all_files_together_and_origins_name_each(shards: Path) -> None:
    found = read(f"{shards}/*.jsonl", rows=10)
    assert [each.origin for each in found if isinstance(each, Located)] == [
        *(f"{shards}/a.jsonl:{number}" for number in range(1, 9)),
        *(f"{shards}/b.jsonl:{number}" for number in (1, 2)),
    ]


def test_a_path_that_exists_wins_over_its_glob(tmp_path: Path) -> None:
    (tmp_path / "[a].jsonl").write_bytes(jsonl(ROWS[:1]))
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[1:2]))
    assert rows(read(tmp_path / "[a].jsonl")) == ROWS[:1]
    assert rows(read(tmp_path / "[ab].jsonl")) == ROWS[1:2]


@pytest.mark.parametrize("act", ACTS)
def test_a_glob_without_match_and_a_file_named_twice_are_refused(
    shards: Path, act: Callable[[DataSource], object]
) -> None:
    with pytest.raises(DataError, match="no file matches") as caught:
        act(source([f"{shards}/a.jsonl", f"{shards}/x*.jsonl"]))
    assert caught.value.where == f"{shards}/x*.jsonl"
    with pytest.raises(DataError, match="named twice") as caught:
        act(source([f"{shards}/*.jsonl", f"{shards}/a.jsonl"]))
    assert caught.value.where == f"{shards}/a.jsonl"
    with pytest.raises(DataError, match="files have no split `test`"):
        act(source(f"{shards}/a.jsonl", split="test"))


def test_the_fingerprint_of_several_files_knows_content_and_order(shards: Path) -> None:
    def of(*names: str) -> str:
        return fingerprint(source([f"{shards}/{name}" for name in names]))

    together = [of("a.jsonl", "b.jsonl"), of("b.jsonl", "a.jsonl"), of("a.jsonl"), of("a.jsonl", "e.csv")]
    assert len(set(together)) == 4
    assert fingerprint(source(f"{shards}/?.jsonl")) == together[0]
    (shards / "b.jsonl").write_bytes((shards / "b.jsonl").read_bytes() + b"\n")
    assert of("a.jsonl", "b.jsonl") != together[0]


def test_an_empty_file_among_others_is_refused(shards: Path) -> None:
    (shards / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match="holds no row") as caught:
        read(f"{shards}/*.jsonl")
    assert caught.value.where == f"{shards}/empty.jsonl"


def test_a_note_on_a_file_is_made_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS))
    notes = Findings()
    assert len(list(records(source(f"{tmp_path}/*.jsonl"), notes))) == 80
    assert notes.counts() == {"byte order mark": 2}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_columns_are_renamed(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [{"q": "1", "a": "2", "x": "3"}, {"q": "4", "a": "5", "x": "6"}])
    found = rows(read(path, columns={"prompt": "q", "completion": "a"}))
    assert found == [{"prompt": "1", "completion": "2", "x": "3"}, {"prompt": "4", "completion": "5", "x": "6"}]
    swapped = rows(read(path, columns={"q": "a", "a": "q"}))
    assert swapped[0] == {"q": "2", "a": "1", "x": "3"}
    assert rows(read(path, columns={"q": "q"}))[0] == {"q": "1", "a": "2", "x": "3"}
    with pytest.raises(DataError, match="no column 'y', which `columns` calls `prompt`") as caught:
        read(path, columns={"prompt": "y"})
    assert "`a`, `q`, `x`" in caught.value.hint
    with pytest.raises(DataError, match="`columns` calls 'q' `a`, but there is such a column"):
        read(path, columns={"a": "q"})


def test_a_later_row_that_has_both_names_is_bad_and_one_that_has_neither_is_left_to_the_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"q": "1"}, {"q": "2", "prompt": "3"}, {"x": "4"}]))
    found = read(path, columns={"prompt": "q"})
    assert rows(found) == [{"prompt": "1"}, {"x": "4"}]
    assert isinstance(found[1], BadRow)
    assert (found[1].kind, found[1].where) == (kinds.DUPLICATE_KEY, f"{path}:2")


def test_a_bad_first_row_does_not_stand_for_the_columns_that_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad: list[dict[str, Any]] = [{"error": "timeout"}, {"q": "1", "prompt": "2"}]
    path.write_bytes(b"5\n" + jsonl([*bad, {"q": "3"}, {"error": "again"}]))
    found = read(path, columns={"prompt": "q"})
    assert rows(found) == [{"error": "timeout"}, {"prompt": "3"}, {"error": "again"}]
    assert [each.where for each in found if isinstance(each, BadRow)] == [f"{path}:1", f"{path}:3"]
    for number, words in ((14, ""), (15, "no column 'q', which `columns` calls `prompt`")):
        path.write_bytes(b"5\n" + jsonl([{"error": "timeout"}] * number + [{"q": "3"}]))
        if not words:
            assert rows(read(path, columns={"prompt": "q"}))[-1] == {"prompt": "3"}
            continue
        with pytest.raises(DataError, match=words) as caught:
            read(path, columns={"prompt": "q"})
        assert caught.value.where == f"{path}:2"


def large(path: Path) -> None:
    """About 30 MB."""
    row = {"prompt": 'Why "so"?\n' * 10, "chosen": "é, " * 200, "rejected": "no " * 200}
    count = 22_000
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
            writer.writerows(row for _ in range(count))
            return
        if path.suffix == ".json":
            stream.write("[")
        for number in range(count):
            comma = "," if number and path.suffix == ".json" else ""
            stream.write(comma + json.dumps(row, ensure_ascii=False) + "\n")
        if path.suffix == ".json":
            stream.write("]")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "coding"), [(".jsonl", ""), (".jsonl", ".gz"), (".jsonl", ".zst"), (".json", ""), (".csv", ".gz")]
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str, coding: str) -> None:
    plain = tmp_path / f"a{suffix}"
    large(plain)
    assert plain.stat().st_size > 29_000_000
    path = tmp_path / f"a{suffix}{coding}"
    if coding:
        path.write_bytes(gzip.compress(plain.read_bytes(), 1) if coding == ".gz" else zstd(plain.read_bytes()))
    tracemalloc.start()
    count = sum(isinstance(each, Located) for each in records(source(path), Findings()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 22_000
    assert peak < 8_000_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_single_row_without_end_does_not_fill_the_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    start = {"a.jsonl": '{"a": "', "a.json": '[{"a": "', "a.csv": "a\n"}[name]
    with path.open("w") as stream:
        stream.write(start)
        for _ in range(300):
            stream.write("x" * 100_000)
    tracemalloc.start()
    found = read(path, max_chars=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 1
    assert isinstance(found[0], BadRow)
    assert peak < 8_000_000


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_abandoned_readers_close_their_files(tmp_path: Path) -> None:
    opened = open_files()
    for name in NAMES:
        found = records(source(write(tmp_path, name)), Findings())
        next(found)
        del found
    assert open_files() == opened


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "name", ["hub:nothing", "hub:owner/name", "hub:owner/name@", "hub:../a/b@main", "hub:a/b@main:", "hub:a/b@main:c d"]
)
def test_a_malformed_reference_is_refused(act: Callable[[DataSource], object], name: str) -> None:
    with pytest.raises(DataError, match="malformed reference") as caught:
        act(source(name))
    assert "owner/name@revision[:config]" in caught.value.hint


def test_a_hub_fingerprint_is_of_name_revision_configuration_and_split() -> None:
    references = [
        ("hub:a/b@main", "train"),
        ("hub:a/b@main", "test"),
        ("hub:a/b@v2", "train"),
        ("hub:a/c@main", "train"),
        ("hub:a/c@main:d", "train"),
        ("hub:a/c@main:e", "train"),
    ]
    assert len({fingerprint(source(name, split=split)) for name, split in references}) == len(references)


def test_a_world_fingerprint_is_of_part_rows_and_seed() -> None:
    sources = [
        source("world:prompts"),
        source("world:prompts", rows=50),
        source("world:prompts", rows=50, seed=1),
        source("world:corpus", rows=50),
    ]
    assert len({fingerprint(each) for each in sources}) == 4
    with pytest.raises(DataError, match="no part 'moon'") as caught:
        fingerprint(source("world:moon"))
    assert "prompts" in caught.value.hint


PREPARE_CACHE = """
import datasets, sys
from datasets.arrow_writer import ArrowWriter
from pathlib import Path

columns = ("prompt", "chosen")
features = datasets.Features({name: datasets.Value("string") for name in columns})
for config in ("default", "other"):
    folder = Path(sys.argv[1]) / "datasets" / "someone___pairs" / config / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / "pairs-train.arrow"), features=features) as writer:
        for number in range(3):
            writer.write({"prompt": f"{config} {number}?", "chosen": "Yes."})
        rows, size = writer.finalize()
    split = datasets.SplitInfo(name="train", num_bytes=size, num_examples=rows, dataset_name="pairs")
    datasets.DatasetInfo(
        builder_name="json", dataset_name="pairs", config_name=config, version="0.0.0",
        features=features, splits=datasets.SplitDict({"train": split}),
    ).write_to_directory(str(folder))
"""

LOAD_FROM_CACHE = """
import json, sys
from data.findings import Findings
from data.sources import records
from pipeline.config import DataSource
from pipeline.errors import DataError

for name, split in json.loads(sys.argv[1]):
    try:
        found = list(records(DataSource(source=name, split=split), Findings()))
        print(json.dumps([[each.origin, *each.record.values()] for each in found]))
    except DataError as error:
        print(json.dumps([error.where, error.what]))
"""


@pytest.mark.slow
def test_hub_data_sets_come_through_datasets_at_the_revision_asked_for(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(REPOSITORY),
    }

    def run(script: str, *arguments: str) -> list[str]:
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    run(PREPARE_CACHE, str(tmp_path))
    cached, revised = (f"hub:someone/pairs@{letter * 40}" for letter in "ab")
    wanted = [
        (f"{cached}:default", "train"),
        (f"{cached}:other", "train"),
        (f"{revised}:other", "train"),
        (f"{cached}:other", "test"),
        ("hub:someone/else@main", "train"),
    ]
    found = [json.loads(line) for line in run(LOAD_FROM_CACHE, json.dumps(wanted))]
    for result, config in zip(found, ("default", "other"), strict=False):
        name = f"{cached}:{config}"
        assert result == [[f"{name}:row {number + 1}", f"{config} {number}?", "Yes."] for number in range(3)]
    assert found[2] == [f"{revised}:other", f"the cache holds revision {'a' * 40}"]
    assert found[3][0] == f"{cached}:other"
    assert "test" in found[3][1]
    assert found[4][0] == "hub:someone/else@main"


READ_AS = """
import os, sys
from pathlib import Path
import datasets
from data.sources import hub
from pipeline.config import DataSource
from pipeline.errors import DataError

names = []
known = datasets.load_dataset_builder
datasets.load_dataset_builder = lambda name, config, revision: known(str(Path("elsewhere", name.partition("/")[2])))
for kind, name, content in (
    ("rows", "rows.jsonl", b'{"text": "a"}'), ("script", "script.py", b"open('canary', 'w')"),
    ("pickle", "train.pkl", b"cos\\nsystem\\n(S'touch canary'\\ntR."), ("archive", "train.tar", b"")):
    folder = Path("elsewhere", kind)
    folder.mkdir(parents=True)
    folder.joinpath(name).write_bytes(content)
    try:
        print(kind, len(list(hub.read(DataSource(source=f"hub:owner/{kind}@main")))))
    except DataError as error:
        print(kind, "refused")
Path("owner/rows").mkdir(parents=True)
try:
    list(hub.read(DataSource(source="hub:owner/rows@main")))
except DataError as error:
    print(error.what)
print(os.path.exists("canary"))
"""


@pytest.mark.slow
def test_data_of_the_hub_is_rows_and_nothing_else_is_read(tmp_path: Path) -> None:
    """Scripts, pickles and archives of pickles, in the place of a data set of the hub's."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", READ_AS]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "rows 1",
        "script refused",
        "pickle refused",
        "archive refused",
        "`owner/rows` is also a path here, which would be read in its place",
        "False",
    ]


def test_reading_files_imports_no_heavy_library(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from data.findings import Findings\n"
        "from data.sources import fingerprint, records\n"
        "from pipeline.config import DataSource\n"
        "for name in sys.argv[1:]:\n"
        "    it = DataSource(source=name)\n"
        "    fingerprint(it), list(records(it, Findings()))\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & sys.modules.keys()))\n"
    )
    names = [str(write(tmp_path, name)) for name in NAMES]
    command = [sys.executable, "-c", script, *names]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
