"""Token stores give back what was written, and a cache entry is used only while all that made it is the same."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
from transformers import PreTrainedTokenizerBase

from data import cache, document_store
from data.blocks import DocumentMixture
from data.document_store import DocumentStore, DocumentWriter, batched, encoded
from data.mixture import draws, stream
from data.template import SPECIAL_TOKENS
from data.tree import Branch, Tree
from data.tree_store import TreeStore, TreeWriter
from pipeline import fingerprint
from pipeline.config import Share
from pipeline.errors import ArtifactError, StorageError

ORIGINS = ["", "pairs.jsonl:7", "größe 日本.parquet:row 12", "caf\udce9.jsonl:1"]
PARTS: dict[str, Any] = {
    "data": "d" * 64,
    "tokenizer": "t" * 64,
    "template": "c" * 64,
    "options": {"trees": "preference", "max_length": 512},
}


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Kitchen:
    """Makes entries, and remembers how often and what was said."""

    def __init__(self) -> None:
        self.made = 0
        self.said: list[str] = []

    def make(self, directory: Path) -> dict[str, Any]:
        self.made += 1
        with TreeWriter(directory / "train") as writer:
            writer.extend(models.pairs(3))
        return {"format": "hh", "dropped": {"tie": 2}}

    def entry(self, key: str = "k" * 64) -> cache.Entry:
        return cache.cached(key, self.make, self.said.append)


def random_trees(count: int, seed: int) -> list[Tree]:
    chance = random.Random(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(chance.choice([0, 1, 2**31 - 1, chance.randrange(2**31)]) for _ in range(chance.randint(1, 9)))

    def branch() -> Branch:
        some = tokens()
        return Branch(some, tuple(chance.random() < 0.5 for _ in some))

    return [
        Tree(
            prompt=tokens(),
            branches=tuple(branch() for _ in range(chance.randint(1, 4))),
            number=chance.randrange(-5, 2**40),
            margin=chance.choice([0.0, 0.1, -1e300, chance.gauss(0, 1)]),
            origin=chance.choice(ORIGINS),
            cut=chance.randrange(100),
        )
        for _ in range(count)
    ]


def blocks_in_memory(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, seed: int) -> list[Tree]:
    """Everything at once: shuffle, encode, lay end to end, cut."""
    texts = list(texts)
    random.Random(f"{seed} documents").shuffle(texts)
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    laid = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    starts = range(0, len(laid) - length + 1, length)
    return [
        Tree((laid[start],), (Branch.of(laid[start + 1 : start + length]),), number)
        for number, start in enumerate(starts)
    ]


def documents(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    pieces = [*models.TEXTS, *SPECIAL_TOKENS, "", " ", "\n", "naïve 日本 🙂", "Ada", "x" * 40]
    return ["".join(chance.choices(pieces, k=chance.randint(0, 6))) for _ in range(count)]


def stored(directory: Path, texts: Sequence[str]) -> DocumentStore:
    tokenizer = models.tokenizer()
    with DocumentWriter(directory, tokenizer.eos_token_id) as writer:
        writer.extend(encoded(tokenizer, texts))
    return DocumentStore(directory)


@pytest.mark.parametrize("seed", range(20))
def test_trees_come_back_equal(tmp_path: Path, seed: int) -> None:
    trees = random_trees(seed * 3, seed)
    with TreeWriter(tmp_path / "trees") as writer:
        writer.extend(trees)
    found = TreeStore(tmp_path / "trees")
    assert list(found) == trees
    assert len(found) == len(trees)
    assert [found[index] for index in range(-len(trees), 0)] == trees
    assert found[1:-1:2] == trees[1:-1:2]
    with pytest.raises(IndexError):
        found[len(trees)]


def test_trees_come_back_with_plain_python_numbers(tmp_path: Path) -> None:
    with TreeWriter(tmp_path / "trees") as writer:
        writer.extend(random_trees(5, 0))
    for tree in TreeStore(tmp_path / "trees"):
        assert {type(token) for branch in tree.branches for token in (*tree.prompt, *branch.tokens)} == {int}
        assert {type(read) for branch in tree.branches for read in branch.read} == {bool}
        assert (type(tree.number), type(tree.margin), type(tree.cut)) == (int, float, int)


def test_two_stores_can_have_numbers_of_their_own(tmp_path: Path) -> None:
    with TreeWriter(tmp_path / "trees") as writer:
        writer.extend(models.pairs(4))
    assert [tree.number for tree in TreeStore(tmp_path / "trees", first=100)] == [100, 101, 102, 103]


@pytest.mark.parametrize("token", [2**31, 2**32, -1])
def test_a_token_that_does_not_fit_is_refused(tmp_path: Path, token: int) -> None:
    with TreeWriter(tmp_path / "trees") as writer, pytest.raises(OverflowError):
        writer.append(Tree((1,), (Branch.of([token]),)))


def tokens(block: Tree) -> list[int]:
    return [*block.prompt, *block.branches[0].tokens]


@pytest.mark.parametrize("seed", range(12))
def test_blocks_of_one_source_are_those_cut_in_memory(tmp_path: Path, seed: int) -> None:
    texts, length = documents(seed * 4, seed), random.Random(seed).randint(2, 60)
    store = stored(tmp_path / "documents", texts)
    expected = blocks_in_memory(models.tokenizer(), texts, length, seed)
    for shares in (None, {"a": Share(epochs=1)}, {"a": Share(weight=0.3)})[: 3 if texts else 1]:
        passes = DocumentMixture({"a": store}, shares, seed).blocks(length)
        assert len(passes) == len(expected)
        for number in (0, 3):
            blocks = passes.pass_(number)
            assert list(blocks) == expected
            assert blocks[:3] == expected[:3]
            assert [blocks[index] for index in range(-len(expected), 0)] == expected


def test_blocks_of_a_mixture_are_the_documents_that_a_pass_takes(tmp_path: Path) -> None:
    stores = {name: stored(tmp_path / name, documents(count, count)) for name, count in (("a", 9), ("b", 14))}
    passes = DocumentMixture(stores, {"a": Share(epochs=2.5), "b": Share(epochs=0.25)}, 7).blocks(5)
    for number in range(5):
        laid = [stores["a"][row].tolist() for row in draws(9, 2.5, number, 7, "a")]
        laid += [stores["b"][row].tolist() for row in draws(14, 0.25, number, 7, "b")]
        random.Random("7 documents").shuffle(laid)
        line = list(itertools.chain.from_iterable(laid))
        blocks = passes.pass_(number)
        assert [tokens(block) for block in blocks] == [line[start : start + 5] for start in range(0, len(line) - 4, 5)]
        assert [block.number for block in blocks] == list(range(len(blocks)))


def test_weights_of_documents_are_shares_of_the_tokens(tmp_path: Path) -> None:
    stores = {
        "long": stored(tmp_path / "long", ["Ada lives. " * 30] * 40),
        "short": stored(tmp_path / "short", ["Ada"] * 90),
    }
    mixture = DocumentMixture(stores, {"long": Share(weight=1), "short": Share(weight=3)}, 0)
    taken = {name: mixture.epochs[name] * store.tokens for name, store in stores.items()}
    assert taken["short"] == pytest.approx(3 * taken["long"])
    whole = sum(store.tokens for store in stores.values())
    assert 4 * len(mixture.blocks(4)) == pytest.approx(whole, rel=0.05)


def test_blocks_stream_from_any_place(tmp_path: Path) -> None:
    stores = {name: stored(tmp_path / name, documents(count, count)) for name, count in (("a", 9), ("b", 14))}
    mixture = DocumentMixture(stores, {"a": Share(epochs=1.5), "b": Share(epochs=0.5)}, 7)
    whole = list(itertools.islice(stream(mixture.blocks(5), 7), 300))
    for start in range(0, 250, 7):
        assert list(itertools.islice(stream(mixture.blocks(5), 7, start), 50)) == whole[start : start + 50]


def test_no_documents_give_no_blocks(tmp_path: Path) -> None:
    stores = {"a": stored(tmp_path / "a", []), "b": stored(tmp_path / "b", [])}
    assert list(DocumentMixture(stores, None, 0).blocks(4).pass_(0)) == []


def test_documents_keep_their_boundaries(tmp_path: Path) -> None:
    texts = documents(30, 1)
    store = stored(tmp_path / "documents", texts)
    end = models.tokenizer().eos_token_id
    assert len(store) == 30
    assert store.tokens == store.lengths.sum()
    for number, text in enumerate(texts):
        assert models.tokenizer().decode(store[number][:-1]) == text
        assert store[number][-1] == end
        assert len(store[number]) == store.lengths[number]


@pytest.mark.parametrize("apart", [False, True])
def test_a_block_knows_where_its_documents_are_from(tmp_path: Path, apart: bool) -> None:
    origins = [f"naïve {number}.txt:{number}" for number in range(40)]
    with DocumentWriter(tmp_path / "documents", 1) as writer:
        for number, origin in enumerate(origins):
            writer.append([number + 10] * (number % 5), origin)
    blocks = DocumentMixture({"part": DocumentStore(tmp_path / "documents")}, None, 3).pass_(0, 7, apart)
    laid = [number for number in blocks._order for _ in range(number % 5 + 1)]
    for place, block in enumerate(blocks):
        within = list(dict.fromkeys(laid[7 * place : 7 * (place + 1)]))
        more = [f"{len(within) - 4} more"] if len(within) > 4 else []
        assert block.origin == " + ".join([*(origins[number] for number in within[:4]), *more])
        assert all(each.origin == block.origin for each in block.documents())


def test_control_tokens_in_a_document_stay_text(tmp_path: Path) -> None:
    control = {models.tokenizer().convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    for ids in encoded(models.tokenizer(), ["".join(SPECIAL_TOKENS), "a<|end|>b"]):
        assert not control & set(ids)


def test_batches_are_bounded_in_documents_and_in_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_store, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(document_store, "BATCH_CHARACTERS", 10)
    texts = ["a"] * 9 + ["b" * 30, "c" * 9, "d", "e"]
    assert [len(batch) for batch in batched(texts)] == [4, 4, 2, 2, 1]
    assert list(itertools.chain.from_iterable(batched(texts))) == texts


def test_texts_are_taken_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_store, "BATCH_DOCUMENTS", 3)
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield "Ada"

    ids = encoded(models.tokenizer(), texts())
    for given in range(1, 20):
        next(ids)
        assert taken <= given + 3


def test_an_entry_is_made_once_and_opened_after(tmp_path: Path) -> None:
    kitchen = Kitchen()
    first, again = kitchen.entry(), kitchen.entry()
    assert (first, kitchen.made, kitchen.said) == (again, 1, [])
    assert again.record == {"format": "hh", "dropped": {"tie": 2}}
    assert list(TreeStore(again.directory / "train")) == models.pairs(3)


def test_another_key_is_another_entry() -> None:
    kitchen = Kitchen()
    assert kitchen.entry("a" * 64).directory != kitchen.entry("b" * 64).directory
    assert kitchen.made == 2


def entry_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("number", range(5))
def test_a_flipped_byte_is_named_set_aside_and_made_again(number: int) -> None:
    kitchen = Kitchen()
    directory = kitchen.entry().directory
    path = entry_files(directory)[number]
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 7)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        kitchen.made, kitchen.said = 0, []
        kitchen.entry()
        assert kitchen.made == 1
        assert len(kitchen.said) == 1
        assert path.name in kitchen.said[0]
        assert path.read_bytes() == content
        aside = Path(kitchen.said[0].rpartition(" now ")[2])
        assert (aside / path.relative_to(directory)).read_bytes() != content


def cut(directory: Path) -> None:
    path = directory / "train" / "tokens.u4"
    path.write_bytes(path.read_bytes()[:-4])


def remove(directory: Path) -> None:
    (directory / "train" / "trees.bin").unlink()


def add(directory: Path) -> None:
    (directory / "more").write_text("x")


def link(directory: Path) -> None:
    path = directory / "train" / "tokens.u4"
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


def empty_index(directory: Path) -> None:
    (directory / "index.json").write_text("")


def other_index(directory: Path) -> None:
    (directory / "index.json").write_text("[1, 2]")


def no_index(directory: Path) -> None:
    (directory / "index.json").unlink()


def become_a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("x")


@pytest.mark.parametrize("damage", [cut, remove, add, link, empty_index, other_index, no_index, become_a_file])
def test_a_damaged_entry_is_made_again(damage: Callable[[Path], None]) -> None:
    kitchen = Kitchen()
    damage(kitchen.entry().directory)
    entry = kitchen.entry()
    assert (kitchen.made, len(kitchen.said)) == (2, 1)
    assert list(TreeStore(entry.directory / "train")) == models.pairs(3)
    assert kitchen.entry() == entry
    assert kitchen.made == 2


def test_an_entry_under_another_key_is_not_taken() -> None:
    kitchen = Kitchen()
    directory = kitchen.entry("a" * 64).directory
    directory.rename(directory.with_name("b" * 64))
    kitchen.entry("b" * 64)
    assert kitchen.made == 2


def test_the_index_names_every_file_with_size_and_digest() -> None:
    directory = Kitchen().entry().directory
    index = json.loads((directory / "index.json").read_text())
    files = [path for path in entry_files(directory) if path.name != "index.json"]
    assert index["files"] == {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": fingerprint.file_sha256(path),
        }
        for path in files
    }
    assert len(files) == 4


def test_two_writers_at_once_both_end_with_the_same_entry(cache_directory: Path) -> None:
    meeting = threading.Barrier(2)
    found: list[cache.Entry] = []

    def make(directory: Path) -> dict[str, Any]:
        meeting.wait(30)
        record = Kitchen().make(directory)
        meeting.wait(30)
        return record

    threads = [
        threading.Thread(target=lambda: found.append(cache.cached("k" * 64, make, lambda line: None))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert list(TreeStore(found[0].directory / "train")) == models.pairs(3)
    assert sorted(path.name for path in (cache_directory / "tokens").iterdir()) == [".lock", "k" * 64]


def test_a_maker_that_fails_leaves_nothing(cache_directory: Path) -> None:
    def make(directory: Path) -> dict[str, Any]:
        (directory / "half").write_text("x")
        raise ArtifactError("no")

    with pytest.raises(ArtifactError):
        cache.cached("k" * 64, make, lambda line: None)
    assert [path.name for path in (cache_directory / "tokens").iterdir()] == [".lock"]


def test_what_a_dead_writer_left_is_cleared_and_a_live_ones_is_not(cache_directory: Path) -> None:
    def nested(directory: Path) -> dict[str, Any]:
        (cache_directory / "tokens" / ".work-dead").mkdir()
        (directory / "mine").write_text("x")
        Kitchen().entry("i" * 64)
        assert (directory / "mine").exists()
        assert not (cache_directory / "tokens" / ".work-dead").exists()
        return {}

    assert cache.cached("o" * 64, nested, lambda line: None).record == {}


@pytest.mark.parametrize("inside", ["", "tokens"])
def test_a_cache_that_cannot_be_a_directory_says_what_to_do(cache_directory: Path, inside: str) -> None:
    (cache_directory / inside).parent.mkdir(exist_ok=True)
    (cache_directory / inside).write_text("a file")
    with pytest.raises(StorageError, match="set BATON_CACHE"):
        Kitchen().entry()


def test_a_cache_on_a_file_system_that_takes_no_files_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE", "/proc/baton")
    with pytest.raises(StorageError, match=r"/proc/baton.*\n.*set BATON_CACHE"):
        Kitchen().entry()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_no_space_and_no_permission_say_what_to_do(code: int) -> None:
    def make(directory: Path) -> dict[str, Any]:
        raise OSError(code, os.strerror(code))

    with pytest.raises(StorageError, match="set BATON_CACHE") as raised:
        cache.cached("k" * 64, make, lambda line: None)
    assert os.strerror(code) in str(raised.value)


def test_a_full_disk_is_told_from_other_errors_of_the_maker() -> None:
    def make(directory: Path) -> dict[str, Any]:
        raise FileNotFoundError(errno.ENOENT, "none", "pairs.jsonl")

    with pytest.raises(FileNotFoundError):
        cache.cached("k" * 64, make, lambda line: None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_serves_what_it_holds(cache_directory: Path) -> None:
    entry = Kitchen().entry()
    (cache_directory / "tokens").chmod(0o555)
    kitchen = Kitchen()
    assert kitchen.entry() == entry
    with pytest.raises(StorageError, match="set BATON_CACHE"):
        kitchen.entry("n" * 64)


def test_an_intact_entry_is_opened_without_writing(cache_directory: Path) -> None:
    entry = Kitchen().entry()
    (cache_directory / "tokens" / ".lock").unlink()
    assert Kitchen().entry() == entry
    assert [path.name for path in (cache_directory / "tokens").iterdir()] == [entry.directory.name]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "cache"
    monkeypatch.setenv("BATON_CACHE", "")
    assert cache.root() == tmp_path / "xdg" / "baton"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.root() == tmp_path / ".cache" / "baton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.root() == tmp_path / ".cache" / "baton"


def test_without_a_home_directory_the_variable_to_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("BATON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(StorageError, match="set BATON_CACHE"):
        cache.root()


def variants() -> Iterator[dict[str, Any]]:
    """The parts of a key with one of them changed."""
    for name in ("data", "tokenizer", "template"):
        yield {**PARTS, name: "0" + PARTS[name][1:]}
    for name in ("options",):
        for each in PARTS[name]:
            yield {**PARTS, name: {**PARTS[name], each: "other"}}
        yield {**PARTS, name: {**PARTS[name], "one more": 1}}


def test_every_part_changes_the_key() -> None:
    keys = {cache.key(**parts) for parts in (PARTS, *variants())}
    assert len(keys) == 1 + 3 + 2 + 1
    assert cache.key(**PARTS) == cache.key(**dict(reversed(PARTS.items())))


def test_every_module_that_makes_tokens_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(fingerprint.ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "er" / "module.py").write_text("x = 1\n")
    original = cache.key(**PARTS)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    seen = {original, cache.key(**PARTS)}
    modules = sorted((tmp_path / "data").rglob("*.py"))
    for path in modules:
        path.write_text(path.read_text() + "\n")
        fingerprint._hashed.clear()  # as another process
        seen.add(cache.key(**PARTS))
    assert len(seen) == 2 + len(modules)


@pytest.mark.parametrize("library", ["tokenizers", "jinja2"])
def test_another_version_of_a_library_changes_the_key(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.key(**PARTS)
    version = cache._version
    monkeypatch.setattr(cache, "_version", lambda name: "0" if name == library else version(name))
    assert cache.key(**PARTS) != before
