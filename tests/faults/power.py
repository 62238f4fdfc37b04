"""Power cuts: what may be on disk after each system call of a publish, by the rules that file systems keep.

The calls of a real publish are recorded with `strace` and replayed on a model of a file system. It keeps a file's data
from the file's last fsync on, and an entry of a directory from that directory's. Of what was not synced anything may be
there: data not at all, as zeros, half or whole; each change of a name done or not. A rename is one change, also between
two directories, as on all journalling file systems. Writes within a file are not reordered.
"""

from __future__ import annotations

import codecs
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.errors import BatonError

from . import children
from .children import Call
from .material import Case

Tree = dict[str, bytes | None]
"""Path -> content, None for a directory."""
Names = tuple[tuple[int, str, int | None], ...]
"""Directory, name and what it names from now on."""

DATA = ("none", "zeros", "half", "all")
_ARGUMENT = re.compile(r'"(?:[^"\\]|\\.)*"|[^,"]+')
_SYNC = ("fsync", "fdatasync")
_ROOT = 0


@dataclass
class File:
    """Data as written and as it is on disk in any case."""

    written: bytes = b""
    synced: bytes = b""

    def after_a_cut(self, kept: str) -> bytes:
        """What may be found."""
        if self.written == self.synced or kept == "none":
            return self.synced
        if kept == "zeros":
            return bytes(len(self.written))
        return self.written[: len(self.written) // 2] if kept == "half" else self.written


@dataclass
class Change:
    """A change of names, which is on disk in any case once one of its directories is synced."""

    names: Names
    synced: bool = False


@dataclass
class Disk:
    """A file system below one directory."""

    place: Path
    files: dict[int, File] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {_ROOT})
    now: dict[tuple[int, str], int] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    opened: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Descriptor -> file or folder and position."""

    @classmethod
    def of(cls, place: Path) -> Disk:
        """What is there, all of it synced."""
        disk = cls(place)
        for path in sorted(place.rglob("*")):
            parent, name = disk._parent(path)
            number = disk._new(is_folder=path.is_dir())
            if not path.is_dir():
                disk.files[number] = File(path.read_bytes(), path.read_bytes())
            disk._change((parent, name, number))
        for change in disk.changes:
            change.synced = True
        return disk

    def apply(self, call: Call) -> None:
        """What a system call does."""
        if call.result < 0:
            return
        arguments = [each.strip() for each in _ARGUMENT.findall(call.arguments) if each.strip()]
        getattr(self, f"_{call.name}", self._nothing)(arguments, call.result)

    def states(self) -> Iterator[Tree]:
        """What may be found after a cut of power."""
        open_changes = [change for change in self.changes if not change.synced]
        for chosen in _choices(open_changes):
            entries = self._entries(chosen)
            for kept in DATA:
                yield self._tree(entries, kept)

    def _entries(self, chosen: Sequence[Change]) -> dict[int, dict[str, int]]:
        found: dict[int, dict[str, int]] = {folder: {} for folder in self.folders}
        kept = {id(change) for change in chosen}
        for change in self.changes:
            if change.synced or id(change) in kept:
                for folder, name, number in change.names:
                    if number is None:
                        found[folder].pop(name, None)
                    else:
                        found[folder][name] = number
        return found

    def _tree(self, entries: dict[int, dict[str, int]], kept: str) -> Tree:
        tree: Tree = {}
        waiting = [(_ROOT, "")]
        while waiting:
            folder, prefix = waiting.pop()
            for name, number in entries[folder].items():
                path = f"{prefix}{name}"
                if number in self.folders:
                    tree[path] = None
                    waiting.append((number, f"{path}/"))
                else:
                    tree[path] = self.files[number].after_a_cut(kept)
        return tree

    def _openat(self, arguments: list[str], descriptor: int) -> None:
        path = self._path(arguments[0], arguments[1])
        if path is None:
            self.opened.pop(descriptor, None)
            return
        parent, name = self._parent(path)
        number = _ROOT if path == self.place else self.now.get((parent, name))
        if number is None:
            number = self._new(is_folder=False)
            self._change((parent, name, number))
        elif "O_TRUNC" in arguments[2]:
            self.files[number].written = b""
        is_appended = "O_APPEND" in arguments[2]
        self.opened[descriptor] = (number, len(self.files[number].written) if is_appended else 0)

    def _write(self, arguments: list[str], count: int) -> None:
        descriptor = _descriptor(arguments[0])
        if descriptor not in self.opened:
            return
        number, position = self.opened[descriptor]
        self._put(number, position, _text(arguments[1])[:count])
        self.opened[descriptor] = (number, position + count)

    def _pwrite64(self, arguments: list[str], count: int) -> None:
        if (descriptor := _descriptor(arguments[0])) in self.opened:
            self._put(self.opened[descriptor][0], int(arguments[3]), _text(arguments[1])[:count])

    def _ftruncate(self, arguments: list[str], result: int) -> None:
        if (descriptor := _descriptor(arguments[0])) in self.opened:
            file = self.files[self.opened[descriptor][0]]
            file.written = file.written[: int(arguments[1])]

    def _fsync(self, arguments: list[str], result: int) -> None:
        descriptor = _descriptor(arguments[0])
        if descriptor not in self.opened:
            return
        number = self.opened[descriptor][0]
        if number in self.files:
            self.files[number].synced = self.files[number].written
        for change in self.changes:
            change.synced |= any(folder == number for folder, _, _ in change.names)

    _fdatasync = _fsync

    def _mkdir(self, arguments: list[str], result: int) -> None:
        self._make_folder(self._path("AT_FDCWD", arguments[0]))

    def _mkdirat(self, arguments: list[str], result: int) -> None:
        self._make_folder(self._path(arguments[0], arguments[1]))

    def _rename(self, arguments: list[str], result: int) -> None:
        self._move(self._path("AT_FDCWD", arguments[0]), self._path("AT_FDCWD", arguments[1]), exchange=False)

    def _renameat(self, arguments: list[str], result: int) -> None:
        self._renameat2([*arguments, ""], result)

    def _renameat2(self, arguments: list[str], result: int) -> None:
        source, target = self._path(*arguments[0:2]), self._path(*arguments[2:4])
        self._move(source, target, exchange="EXCHANGE" in arguments[4])

    def _unlink(self, arguments: list[str], result: int) -> None:
        self._remove(self._path("AT_FDCWD", arguments[0]))

    _rmdir = _unlink

    def _unlinkat(self, arguments: list[str], result: int) -> None:
        self._remove(self._path(arguments[0], arguments[1]))

    def _nothing(self, arguments: list[str], result: int) -> None:
        """Modes do not matter here; copying within the kernel would."""
        assert "copy_file_range" not in arguments

    def _make_folder(self, path: Path | None) -> None:
        if path is not None:
            self._change((*self._parent(path), self._new(is_folder=True)))

    def _move(self, source: Path | None, target: Path | None, *, exchange: bool) -> None:
        assert source is not None
        assert target is not None
        first, second = self._parent(source), self._parent(target)
        moved, there = self.now[first], self.now.get(second)
        self._change((*second, moved), (*first, there if exchange else None))

    def _remove(self, path: Path | None) -> None:
        if path is not None:
            self._change((*self._parent(path), None))

    def _change(self, *names: tuple[int, str, int | None]) -> None:
        for folder, name, number in names:
            if number is None:
                del self.now[folder, name]
            else:
                self.now[folder, name] = number
        self.changes.append(Change(names))

    def _new(self, *, is_folder: bool) -> int:
        number = len(self.files) + len(self.folders)
        if is_folder:
            self.folders.add(number)
        else:
            self.files[number] = File()
        return number

    def _put(self, number: int, position: int, data: bytes) -> None:
        file = self.files[number]
        before = file.written[:position].ljust(position, b"\0")
        file.written = before + data + file.written[position + len(data) :]

    def _path(self, folder: str, path: str) -> Path | None:
        """The path that a call was given, if it is below the place."""
        base = folder.partition("<")[2].rpartition(">")[0]
        found = Path(base, _text(path).decode())
        return found if found.is_relative_to(self.place) else None

    def _parent(self, path: Path) -> tuple[int, str]:
        folder = _ROOT
        parts = path.relative_to(self.place).parts
        for name in parts[:-1]:
            folder = self.now[folder, name]
        return folder, parts[-1] if parts else ""


def record(case: Case, root: Path) -> tuple[Disk, list[Call]]:
    """The disk before a publish, and the system calls of the publish."""
    place = root / "recorded"
    place.mkdir()
    children.run(partial(case.prepare, place), root / "output")
    disk = Disk.of(place)
    return disk, children.calls(partial(case.publish, place, "new"), root / "output", root / "calls")


def states(disk: Disk, made: Sequence[Call], without: frozenset[int] = frozenset()) -> Iterator[tuple[int, Tree]]:
    """Every different state in which a cut after each of the calls may leave the disk.

    Args:
        disk: Before; it is changed.
        made: The calls.
        without: Places of calls that are left out, as fsyncs, to see what they are good for.
    """
    seen: set[tuple[bool, frozenset[tuple[str, bytes | None]]]] = set()
    for place, call in enumerate(made):
        if place not in without:
            disk.apply(call)
        done = place == len(made) - 1
        for tree in disk.states():
            known = (done, frozenset(tree.items()))
            if known not in seen:
                seen.add(known)
                yield place, tree


def write(tree: Tree, place: Path) -> None:
    """Bring a state to a real directory."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path, content in sorted(tree.items()):
        if content is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(content)


def syncs(made: Sequence[Call]) -> list[int]:
    """Places of the calls that make something durable."""
    return [place for place, call in enumerate(made) if call.name in _SYNC]


def problems(case: Case, root: Path, *, recover: bool = True) -> Iterator[str]:
    """What is wrong with each state in which a power cut may leave a publish; empty where nothing is.

    Args:
        case: What is published.
        root: Where.
        recover: Require also that the next process recovers.
    """
    disk, made = record(case, root)
    for place, tree in states(disk, made):
        write(tree, root / "cut")
        problem, said = "", root / "output"
        try:
            case.require_absent_or_complete(root / "cut", done=place == len(made) - 1)
            if recover and children.run(partial(case.require_recovery, root / "cut"), said) != 0:
                problem = said.read_text(encoding="utf-8")
        except (AssertionError, BatonError) as error:
            problem = str(error)
        yield problem


def damaged_without(case: Case, root: Path, disk: Disk, made: Sequence[Call], without: frozenset[int]) -> int:
    """How many states are damaged, or lose what was done, where some syncs were left out."""
    count = 0
    for place, tree in states(disk, made, without):
        write(tree, root / "cut")
        try:
            case.require_absent_or_complete(root / "cut", done=place == len(made) - 1)
        except (AssertionError, BatonError):
            count += 1
    return count


def _choices(changes: list[Change]) -> Iterator[list[Change]]:
    """None of them, all, all up to each, all but each, and each alone."""
    yield []
    for number in range(len(changes)):
        yield changes[: number + 1]
        yield changes[:number] + changes[number + 1 :]
        yield [changes[number]]


def _descriptor(argument: str) -> int:
    return int(argument.partition("<")[0])


def _text(argument: str) -> bytes:
    return codecs.escape_decode(argument.strip()[1:-1].encode())[0]  # type: ignore[attr-defined, no-any-return]
